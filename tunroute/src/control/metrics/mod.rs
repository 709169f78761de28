//! Metrics: the status, and the time that the daemon's passes take.
//!
//! The format is OpenMetrics, which Prometheus asks for, or the older text format. Units are seconds and bytes.

mod format;
mod server;

use std::{fmt, sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

pub use self::{format::Format, server::Server};
use crate::{control::status::Status, exits::health::Verdict, kernel::Traffic};

/// Measurements of the daemon itself. Clones share the same instruments.
#[derive(Clone, Debug)]
pub struct Instruments {
    passes: Histogram,
    repairs: Counter,
}

impl Default for Instruments {
    fn default() -> Self {
        // From a pass without changes to a restart with a million prefixes.
        let bounds = [0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];
        Self { passes: Histogram::new(bounds), repairs: Counter::default() }
    }
}

impl Instruments {
    /// Records the duration of a pass.
    pub fn pass(&self, took: Duration) {
        self.passes.observe(took.as_secs_f64());
    }

    /// Counts a repair of something that others had removed.
    pub fn repair(&self) {
        self.repairs.inc();
    }
}

/// The text of a scrape, as OpenMetrics.
///
/// # Errors
///
/// None in practice: writing to a string does not fail.
pub fn encode(status: &Status, instruments: &Instruments) -> Result<String, fmt::Error> {
    let mut scrape = Scrape(Registry::with_prefix("tunroute"));
    let passes = "Time that a pass took: observe, compile, plan and apply";
    scrape.0.register("pass_duration_seconds", passes, instruments.passes.clone());
    let repairs = "Times that something removed by others was put back";
    scrape.0.register("repairs", repairs, instruments.repairs.clone());
    scrape.daemon(status);
    scrape.tunnels(status);
    scrape.policies(status);
    let mut text = String::new();
    text::encode(&mut text, &scrape.0)?;
    Ok(text)
}

type Labels = Vec<(&'static str, String)>;

/// The metrics of one scrape.
struct Scrape(Registry);

impl Scrape {
    fn gauges(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).set(value);
        }
        self.0.register(name, help, family);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.gauges(name, help, [(Labels::new(), value)]);
    }

    fn counters(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, u64)>) {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).inc_by(value);
        }
        self.0.register(name, help, family);
    }

    fn daemon(&mut self, status: &Status) {
        let Status { version, uptime, problems, kernel, fast_path, .. } = status;
        self.gauges("build_info", "The daemon's version", [(vec![("version", version.clone())], 1.0)]);
        self.gauge("uptime_seconds", "Time since the daemon was started", number(*uptime));
        self.gauge("problems", "Failed operations, which are tried again", count(problems.len()));
        self.gauge("kernel_rules", "Installed rules", count(kernel.rules));
        self.gauge("kernel_routes", "Installed routes", count(kernel.routes));
        let on = truth(fast_path.state == "on");
        self.gauge("fast_path_on", "1 if the fast path is attached and open at all configured devices", on);
        let reasons = count(fast_path.reasons.len());
        self.gauge("fast_path_reasons", "Reasons why it is not, such as closed gates", reasons);
        let gates = fast_path.gates.iter().map(|(gate, closed)| (vec![("gate", gate.clone())], count(*closed)));
        self.gauges("gates_closed", "Closed gates of this name, which leave packets to the kernel", gates);
        let unmatched = || fast_path.unmatched.iter();
        let packets = unmatched().map(|counter| (Labels::new(), counter.packets));
        self.counters("unmatched_packets", "Unmatched packets that the programs have forwarded", packets);
        let bytes = unmatched().map(|counter| (Labels::new(), counter.bytes));
        self.counters("unmatched_bytes", "Their layer 3 bytes", bytes);
        let early = fast_path.xdp.iter().map(|device| {
            let labels = vec![("role", device.role.to_string()), ("device", device.device.clone())];
            (labels, truth(device.because.is_none()))
        });
        self.gauges("xdp_takes_part", "1 if XDP decides the device's frames, or sends frames to it", early);
        let maps = || fast_path.maps.iter();
        let label = |name: &str| vec![("map", name.to_owned())];
        let entries = maps().map(|map| (label(&map.name), count(map.entries)));
        self.gauges("map_entries", "Used entries of the fast path's maps", entries);
        let capacities = maps().map(|map| (label(&map.name), count(map.capacity)));
        self.gauges("map_capacity", "Maximum number of entries", capacities);
    }

    fn tunnels(&mut self, status: &Status) {
        let tunnels = || status.tunnels.iter();
        let label = |name: &str| vec![("tunnel", name.to_owned())];
        let up = tunnels().map(|tunnel| (label(&tunnel.name), truth(tunnel.state == "up")));
        self.gauges("tunnel_up", "1 if the device is up and its probes are answered", up);
        let states = tunnels().map(|tunnel| {
            let labels = vec![("tunnel", tunnel.name.clone()), ("state", tunnel.state.clone())];
            (labels, 1.0)
        });
        self.gauges("tunnel_state", "1 for the state that the tunnel is in", states);
        let directions = || {
            tunnels().flat_map(|tunnel| {
                let label = |to: &str| vec![("tunnel", tunnel.name.clone()), ("direction", to.to_owned())];
                tunnel.traffic.into_iter().flat_map(move |traffic| {
                    let Traffic { sent_packets, sent_bytes, received_packets, received_bytes } = traffic;
                    [
                        (label("sent"), [sent_packets, sent_bytes]),
                        (label("received"), [received_packets, received_bytes]),
                    ]
                })
            })
        };
        let packets = directions().map(|(labels, [packets, _])| (labels, packets));
        self.counters("tunnel_packets", "All packets sent by the device, and received from it", packets);
        let bytes = directions().map(|(labels, [_, bytes])| (labels, bytes));
        self.counters("tunnel_bytes", "Their bytes", bytes);
        let mtus = tunnels().filter_map(|tunnel| Some((label(&tunnel.name), f64::from(tunnel.mtu?))));
        self.gauges("tunnel_mtu_bytes", "The device's MTU", mtus);

        let probes = || tunnels().flat_map(|tunnel| &tunnel.probes);
        let label = |tunnel: &str, target: &str| vec![("tunnel", tunnel.to_owned()), ("target", target.to_owned())];
        let up = probes().map(|probe| (label(&probe.tunnel, &probe.target), truth(probe.verdict != Verdict::Down)));
        self.gauges("probe_up", "0 if the probe counts its tunnel as down", up);
        let delays = probes().filter_map(|probe| {
            let delay = Duration::from_micros(probe.mean_delay_us?).as_secs_f64();
            Some((label(&probe.tunnel, &probe.target), delay))
        });
        self.gauges("probe_delay_seconds", "Mean time to the answer, of the last 100 probes", delays);
        let losses = probes()
            .filter_map(|probe| Some((label(&probe.tunnel, &probe.target), f64::from(probe.loss_percent?) / 100.0)));
        self.gauges("probe_loss_ratio", "Share of the last 100 probes without an answer", losses);
    }

    fn policies(&mut self, status: &Status) {
        let policies = || status.policies.iter();
        let label = |name: &str| vec![("policy", name.to_owned())];
        let prefixes = policies().map(|policy| (label(&policy.name), count(policy.prefixes)));
        self.gauges("policy_prefixes", "Source prefixes of the policy", prefixes);
        let active = policies().flat_map(|policy| {
            policy.active.iter().map(|(family, by)| {
                let labels = vec![("policy", policy.name.clone()), ("family", family.to_string()), ("by", by.clone())];
                (labels, 1.0)
            })
        });
        self.gauges("policy_leaves_by", "The tunnel that carries the policy, or on-down while none is up", active);
        let decided = policies().flat_map(|policy| {
            policy.carried_by.iter().map(|(family, by)| {
                let labels = vec![("policy", policy.name.clone()), ("family", family.to_string())];
                (labels, truth(by == "fast path"))
            })
        });
        self.gauges("policy_on_fast_path", "1 if the fast path decides forwarded packets, 0 if the kernel", decided);
        let outcomes = || {
            policies().flat_map(|policy| {
                policy.outcomes.iter().map(|(outcome, counter)| {
                    (vec![("policy", policy.name.clone()), ("outcome", outcome.clone())], *counter)
                })
            })
        };
        let packets = outcomes().map(|(labels, counter)| (labels, counter.packets));
        self.counters("policy_packets", "Packets that the fast path has seen, by outcome", packets);
        let bytes = outcomes().map(|(labels, counter)| (labels, counter.bytes));
        self.counters("policy_bytes", "Their layer 3 bytes", bytes);
    }
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn count(value: usize) -> f64 {
    number(u64::try_from(value).unwrap_or(u64::MAX))
}

/// Exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "all that Prometheus keeps is a double")]
fn number(value: u64) -> f64 {
    value as f64
}
