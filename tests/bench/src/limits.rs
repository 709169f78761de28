//! Up to how many prefixes a contestant is bearable: judged by how it has grown so far.

use std::time::Duration;

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
    /// With so many prefixes …
    pub prefixes: u32,
    /// … installing took so long, …
    pub install: Duration,
    /// … and a packet so long.
    pub packet: Duration,
}

impl Limits {
    /// Why the next number of prefixes is not tried, if it would not be bearable.
    #[must_use]
    pub fn stop(&self, steps: &[Step], next: u32) -> Option<String> {
        let last = steps.last()?;
        for (what, limit, of) in [
            ("installing them", self.install, (|step| step.install) as fn(&Step) -> Duration),
            ("one packet", self.packet, |step| step.packet),
        ] {
            let expected = expected(steps, next, of);
            if expected > limit {
                return Some(format!(
                    "stopped after {}: {what} took {:.1?} there, and would take some {expected:.0?} with {next} (more \
                     than {limit:.0?})",
                    last.prefixes,
                    of(last),
                ));
            }
        }
        None
    }
}

/// Continues the growth between the last two steps: as the power of the number that it was, but at least 0.
fn expected(steps: &[Step], next: u32, of: fn(&Step) -> Duration) -> Duration {
    let [.., last] = steps else { return Duration::ZERO };
    let power = match steps {
        [.., before, last] => {
            let (time, prefixes) =
                (of(last).div_duration_f64(of(before)), f64::from(last.prefixes) / f64::from(before.prefixes));
            (time.ln() / prefixes.ln()).max(0.0)
        }
        _ => 0.0,
    };
    let factor = (f64::from(next) / f64::from(last.prefixes)).powf(power);
    Duration::try_from_secs_f64(of(last).as_secs_f64() * factor).unwrap_or(Duration::MAX)
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
        for (steps, next, stopped) in [
            (&[][..], 1, false),
            (&[step(1000, 100, 500)], 10_000, false),
            // Linear: 1 s, then 10 s.
            (&[step(1000, 10, 500), step(10_000, 100, 500)], 100_000, false),
            // Quadratic: 0.9 s leads to 90 s.
            (&[step(1000, 9, 500), step(10_000, 900, 500)], 100_000, true),
            // Packets: 24 µs lead to 240 µs.
            (&[step(1000, 10, 2400), step(10_000, 10, 24_000)], 100_000, true),
        ] {
            assert_eq!(limits.stop(steps, next).is_some(), stopped, "{steps:?}");
        }
        let why = limits.stop(&[step(1000, 9, 500), step(10_000, 900, 500)], 100_000).expect("stopped");
        assert_eq!(
            why,
            "stopped after 10000: installing them took 900.0ms there, and would take some 90s with 100000 (more than 10s)"
        );
    }
}
