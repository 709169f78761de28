//! Up to how many prefixes a contestant is bearable: judged by how it has grown so far.

use std::time::Duration;

use crate::report::table::thousands;

/// What is bearable.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To install all prefixes.
    pub install: Duration,
    /// To forward one packet.
    pub packet: Duration,
}

/// One step on the way.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// With this number of prefixes …
    pub prefixes: u32,
    /// … installing took so long, …
    pub install: Duration,
    /// … and a packet so long.
    pub packet: Duration,
}

/// Number of prefixes that is always tried: even quadratic growth installs them within seconds, and a smaller number shows
/// no growth, as starting a process takes most of the time there.
const ALWAYS_TRIED: u32 = 1000;

impl Limits {
    /// Why the next number of prefixes is not tried, if it would not be bearable. The time to install is known to grow with
    /// some power of the number at least.
    #[must_use]
    pub fn stop(&self, steps: &[Step], next: u32, growth: f64) -> Option<String> {
        let last = steps.last().filter(|_| next > ALWAYS_TRIED)?;
        for (what, limit, growth, of) in [
            ("installing them", self.install, growth, (|step| step.install) as fn(&Step) -> Duration),
            ("one packet", self.packet, 0.0, |step| step.packet),
        ] {
            let expected = expected(steps, next, growth, of);
            if expected > limit {
                return Some(format!(
                    "stopped after {}: {what} took {:.2?} there, and would take some {expected:.0?} with {} (more than \
                     {limit:.0?})",
                    thousands(last.prefixes.into()),
                    of(last),
                    thousands(next.into()),
                ));
            }
        }
        None
    }
}

/// Continues the growth so far, as a power of the number.
fn expected(steps: &[Step], next: u32, growth: f64, of: fn(&Step) -> Duration) -> Duration {
    let time = |step: &Step| of(step).as_secs_f64();
    let expected = match steps {
        [] => 0.0,
        [.., a, b, c] if time(c) > time(b) && time(b) > time(a) => {
            // What does not grow, such as the start of a process, is no part of the differences.
            let power = power((time(c) - time(b)) / (time(b) - time(a)), factor(b, c.prefixes)).max(growth);
            time(c) + (time(c) - time(b)) * factor(c, next).powf(power)
        }
        [.., a, b] => time(b) * factor(b, next).powf(power(time(b) / time(a), factor(a, b.prefixes)).max(growth)),
        [a] => time(a) * factor(a, next).powf(growth),
    };
    Duration::try_from_secs_f64(expected).unwrap_or(Duration::MAX)
}

/// The power of the number with which a time has grown; at least 0.
fn power(time: f64, prefixes: f64) -> f64 {
    (time.ln() / prefixes.ln()).max(0.0)
}

fn factor(last: &Step, next: u32) -> f64 {
    f64::from(next) / f64::from(last.prefixes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_where_growth_leads_beyond_the_limit() {
        let limits = Limits { install: Duration::from_secs(10), packet: Duration::from_micros(100) };
        let step = |prefixes, install_ms, packet_ns| Step {
            prefixes,
            install: Duration::from_millis(install_ms),
            packet: Duration::from_nanos(packet_ns),
        };
        for (steps, next, growth, stopped) in [
            (&[][..], 1, 2.0, false),
            (&[step(1000, 100, 500)], 10_000, 0.0, false),
            // One rule tells nothing of a thousand; both together tell of more, 20 ms of 2 s.
            (&[step(1, 5, 500)], 1000, 2.0, false),
            (&[step(1, 5, 500), step(1000, 20, 500)], 10_000, 2.0, false),
            (&[step(1, 5, 500)], 1_000_000, 2.0, true),
            // Known to be quadratic: 20 ms lead to 2 s, but 20 s lead beyond.
            (&[step(1000, 20, 500)], 10_000, 2.0, false),
            (&[step(1000, 20, 500)], 100_000, 2.0, true),
            // Linear: 1 s, then 10 s.
            (&[step(1000, 10, 500), step(10_000, 99, 500)], 100_000, 0.0, false),
            // Quadratic: 0.9 s leads to 90 s.
            (&[step(1000, 9, 500), step(10_000, 900, 500)], 100_000, 0.0, true),
            // Quadratic behind a start of 200 ms, which hides it.
            (&[step(100, 200, 500), step(1000, 210, 500), step(10_000, 1200, 500)], 100_000, 0.0, true),
            // Linear behind a start of 200 ms.
            (&[step(100, 201, 500), step(1000, 210, 500), step(10_000, 300, 500)], 100_000, 0.0, false),
            // Packets: 24 µs lead to 240 µs.
            (&[step(1000, 10, 2400), step(10_000, 10, 24_000)], 100_000, 0.0, true),
        ] {
            assert_eq!(limits.stop(steps, next, growth).is_some(), stopped, "{steps:?}");
        }
        let why = limits.stop(&[step(1000, 9, 500), step(10_000, 900, 500)], 100_000, 0.0).expect("stopped");
        assert_eq!(
            why,
            "stopped after 10,000: installing them took 900.00ms there, and would take some 90s with 100,000 (more than \
             10s)"
        );
    }
}
