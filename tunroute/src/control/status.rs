//! `tunroute status`: the types behind `--json`, and the table.

use std::{collections::BTreeMap, fmt::Write as _};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde::{Deserialize, Serialize};

use crate::{
    commands::text::wrapped, config::Datapath, exits::health, exits::supervise, kernel::Traffic, policy::net::Family,
    policy::xdp_devices::Role,
};

/// Width of the printed status, in columns.
const WIDTH: usize = 80;

/// Everything about a running daemon.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime: u64,
    /// The configured datapath.
    pub datapath: Datapath,
    /// The tunnels, in the order of the configuration.
    pub tunnels: Vec<TunnelStatus>,
    /// The policies, in the order of the configuration.
    pub policies: Vec<PolicyStatus>,
    /// The fast path.
    pub fast_path: FastPathStatus,
    /// The kernel datapath.
    pub kernel: KernelStatus,
    /// Failed operations, which are tried again, and source prefixes that two policies claim; empty if all is in force.
    pub problems: Vec<String>,
    /// Recommended changes to this host, and packets that go another way than configured.
    #[serde(default)]
    pub hints: Vec<String>,
}

/// A tunnel.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TunnelStatus {
    /// The device's name.
    pub name: String,
    /// `up`, `down`, `failed` (its probe is not answered), `unable` (it carries no family that policies send by it) or
    /// `pending` (there is no such device yet).
    pub state: String,
    /// The device's number.
    pub ifindex: Option<u32>,
    /// Its MTU, in bytes.
    pub mtu: Option<u32>,
    /// By family: the limit of the TCP segment size, in bytes, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mss: Option<BTreeMap<Family, u16>>,
    /// The families whose probes are not answered.
    pub failed: Vec<Family>,
    /// By family that policies send by it: why the device cannot carry it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub unable: BTreeMap<Family, String>,
    /// The device's traffic.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub traffic: Option<Traffic>,
    /// Its supervised command, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<supervise::Status>")]
    pub command: Option<serde_json::Value>,
    /// Its probes.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub probes: Vec<health::Status>,
}

/// A policy.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PolicyStatus {
    /// The policy's name.
    pub name: String,
    /// How many source prefixes it has.
    pub prefixes: usize,
    /// The interfaces whose prefixes are among them, followed live.
    #[serde(default)]
    pub follows: Vec<String>,
    /// Its routing table.
    pub table: Option<u32>,
    /// By family: the tunnel that carries its packets, or `on-down` while none is up; `main` if the main table decides.
    pub active: BTreeMap<Family, String>,
    /// By family: what decides forwarded packets, `fast path` or `kernel`.
    pub carried_by: BTreeMap<Family, String>,
    /// Packets that the fast path handed to the tunnel.
    pub packets: u64,
    /// Their layer 3 bytes.
    pub bytes: u64,
    /// Packets that the fast path has seen, by outcome.
    pub outcomes: BTreeMap<String, OutcomeStatus>,
}

/// A counter.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct OutcomeStatus {
    /// Packets; a GSO packet is one.
    pub packets: u64,
    /// Layer 3 bytes.
    pub bytes: u64,
}

/// The fast path.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct FastPathStatus {
    /// `on`, `partly` or `off`.
    pub state: String,
    /// Programs are being loaded, which takes a second or two.
    #[serde(default)]
    pub loading: bool,
    /// Why it is not `on`, and what to do about it.
    pub reasons: Vec<String>,
    /// The gates by name, with how many of each are closed; none where the fast path is not used.
    #[serde(default)]
    pub gates: BTreeMap<String, usize>,
    /// What the gates cannot see on this kernel.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unseen: Option<String>,
    /// Where programs are attached: `ingress dev lan0`.
    pub attached: Vec<String>,
    /// How they are attached: `tcx` or `clsact`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// How full its maps are.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub maps: Vec<MapStatus>,
    /// The devices that XDP could use, unless it is off.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub xdp: Vec<XdpStatus>,
    /// Unmatched traffic that the programs have forwarded by the main table, with `unmatched = "fast"`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unmatched: Option<OutcomeStatus>,
}

/// A device that XDP could use.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct XdpStatus {
    /// Its role.
    pub role: Role,
    /// Its name.
    pub device: String,
    /// Why XDP does not use it; none if it does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub because: Option<String>,
}

/// How full a map is.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct MapStatus {
    /// The map's name.
    pub name: String,
    /// Used entries; of `INDEX`, words of 8 bytes.
    pub entries: usize,
    /// Maximum number of entries. `INDEX` is replaced by a larger one when it is full.
    pub capacity: usize,
}

/// The kernel datapath.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct KernelStatus {
    /// Installed rules.
    pub rules: usize,
    /// The families whose rules are a tree.
    #[serde(default)]
    pub trees: Vec<Family>,
    /// Installed routes.
    pub routes: usize,
}

/// The JSON Schema of `tunroute status --json`.
#[must_use]
pub fn schema() -> serde_json::Value {
    SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<Status>().to_value()
}

/// A line, wrapped with an indent.
fn paragraph(line: &str) -> String {
    wrapped(line, WIDTH, 4).join("\n") + "\n"
}

impl Status {
    /// The status as a person reads it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        let Self { version, pid, uptime, .. } = self;
        let uptime = humantime::format_duration(std::time::Duration::from_secs(*uptime));
        let datapath = self.datapath.name();
        // Writing to a string does not fail.
        let _infallible = writeln!(text, "tunroute {version}, pid {pid}, up {uptime}, datapath {datapath}\n");

        let mut tunnels = table(&["TUNNEL", "STATE", "IFINDEX", "MTU"], &[2, 3]);
        for tunnel in &self.tunnels {
            let number = |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
            tunnels.add_row(vec![
                tunnel.name.clone(),
                tunnel.state.clone(),
                number(tunnel.ifindex),
                number(tunnel.mtu),
            ]);
        }
        let _infallible = writeln!(text, "{}\n", trimmed(&tunnels));

        let mut policies = table(&["POLICY", "PREFIXES", "LEAVES BY", "DECIDED BY", "PACKETS", "BYTES"], &[1, 4, 5]);
        for policy in &self.policies {
            policies.add_row(vec![
                policy.name.clone(),
                policy.prefixes.to_string(),
                by_family(&policy.active),
                by_family(&policy.carried_by),
                policy.packets.to_string(),
                bytes(policy.bytes),
            ]);
        }
        let _infallible = writeln!(text, "{}\n", trimmed(&policies));

        for policy in &self.policies {
            for (outcome, counter) in policy.outcomes.iter().filter(|(_, counter)| counter.packets > 0) {
                if let Some(what) = in_words(outcome) {
                    text += &paragraph(&format!("{}: {} packets {what}", policy.name, counter.packets));
                }
            }
        }
        let KernelStatus { rules, trees, routes } = &self.kernel;
        let trees: Vec<String> = trees.iter().map(ToString::to_string).collect();
        let trees = if trees.is_empty() { String::new() } else { format!(" ({} as a tree)", trees.join(" and ")) };
        let _infallible = writeln!(text, "kernel: {rules} rules{trees}, {routes} routes");
        let FastPathStatus { state, attached, reasons, unmatched, unseen, xdp, .. } = &self.fast_path;
        let attached = if attached.is_empty() { String::new() } else { format!(" ({})", attached.join(", ")) };
        let mut add = |line: &str| text += &paragraph(line);
        add(&format!("fast path: {state}{attached}"));
        if let Some(OutcomeStatus { packets, bytes: volume }) = unmatched {
            add(&format!("  by the main table: {packets} unmatched packets, {}", bytes(*volume)));
        }
        // Without a device that takes frames, XDP is not mentioned.
        if xdp.iter().any(|device| device.role == Role::Tunnel && device.because.is_none()) {
            for XdpStatus { role, device, because } in xdp {
                let part = because.as_ref().map_or_else(|| "used".to_owned(), |because| format!("not used: {because}"));
                add(&format!("  xdp: {role} {device} {part}"));
            }
        }
        reasons.iter().chain(unseen).for_each(|reason| add(&format!("  {reason}")));
        self.problems.iter().for_each(|problem| add(&format!("problem: {problem}")));
        self.hints.iter().for_each(|hint| add(&format!("hint: {hint}")));
        text
    }
}

/// The fate of packets that were not handed to the tunnel, in words.
pub(crate) fn in_words(outcome: &str) -> Option<&'static str> {
    Some(match outcome {
        "leak_prevented" => "dropped at an uplink that they must not leave by",
        "blackholed" => "dropped while no tunnel was up",
        "exempt" => "left to the kernel: exempt destination",
        "down" => "left to the kernel: no tunnel was up",
        "hairpin" => "left to the kernel: came from the tunnel itself",
        "expired" => "left to the kernel: hop limit expired",
        "too_big" => "left to the kernel: too big for the tunnel",
        "source_check" => "left to the kernel: source not expected there",
        "closed" => "left to the kernel: fast path closed",
        "unresolved" => "left to the kernel: next hop not known",
        "main" => "left to the main table: via = \"main\"",
        _ => return None,
    })
}

fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    // Each cell has a space on either side, and the first one's is cut off.
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(u16::try_from(WIDTH + 1).unwrap_or(u16::MAX));
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn trimmed(table: &Table) -> String {
    table.trim_fmt().lines().map(|line| line.strip_prefix(' ').unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

/// One value if both families have the same.
pub(crate) fn by_family(values: &BTreeMap<Family, String>) -> String {
    let mut distinct: Vec<&String> = values.values().collect();
    distinct.dedup();
    match distinct.as_slice() {
        [] => "-".to_owned(),
        [one] => (*one).clone(),
        _ => values.iter().map(|(family, value)| format!("{family}: {value}")).collect::<Vec<_>>().join("\n"),
    }
}

/// Bytes with a binary unit, at most four digits.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes;
    let mut tenths = 0;
    let mut unit = 0;
    while value >= 1024 && unit + 1 < UNITS.len() {
        tenths = value % 1024 * 10 / 1024;
        value /= 1024;
        unit += 1;
    }
    if unit == 0 { format!("{value} B") } else { format!("{value}.{tenths} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(name: &str, device: &str, reason: &str) -> Status {
        let both = |value: &str| Family::ALL.map(|family| (family, value.to_owned())).into();
        let counter = OutcomeStatus { packets: u64::MAX, bytes: u64::MAX };
        Status {
            version: "0.1.0".into(),
            pid: u32::MAX,
            uptime: 40_000_000,
            datapath: Datapath::Both,
            tunnels: vec![TunnelStatus {
                name: device.into(),
                state: "pending".into(),
                ifindex: Some(u32::MAX),
                mtu: Some(65_535),
                mss: None,
                failed: Vec::new(),
                unable: BTreeMap::new(),
                traffic: None,
                command: None,
                probes: Vec::new(),
            }],
            policies: vec![PolicyStatus {
                name: name.into(),
                prefixes: 1_000_000,
                follows: Vec::new(),
                table: None,
                active: both(device),
                carried_by: [(Family::V4, "fast path".to_owned()), (Family::V6, "kernel".to_owned())].into(),
                packets: u64::MAX,
                bytes: u64::MAX,
                outcomes: [("leak_prevented".to_owned(), counter)].into(),
            }],
            fast_path: FastPathStatus {
                state: "partly".into(),
                reasons: vec![reason.into()],
                attached: vec![format!("ingress dev {device}"); 20],
                ..FastPathStatus::default()
            },
            kernel: KernelStatus::default(),
            problems: vec![reason.into()],
            hints: vec![reason.into()],
        }
    }

    #[test]
    fn fits_the_screen_whatever_the_names() {
        let reason = "netfilter looks at forwarded IPv6 packets ".repeat(5);
        for (name, device) in [("tunnel0", "sixxs0"), (&"p".repeat(64)[..], "fifteen-letters")] {
            let text = status(name, device, &reason).render();
            for line in text.lines() {
                assert!(line.chars().count() <= WIDTH, "{} columns: {line}\n{text}", line.chars().count());
            }
            // Nothing is cut off: long text is wrapped.
            assert!(text.matches('p').count() >= name.matches('p').count(), "{text}");
            assert_eq!(text.matches("netfilter").count(), 15, "{text}");
        }
    }
}
