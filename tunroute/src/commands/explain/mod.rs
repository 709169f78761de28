//! `tunroute explain`: what becomes of one packet, step by step, and whether both datapaths agree on it.

pub mod agreement;
pub mod examiner;
pub mod expected;

use std::{fmt::Write as _, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    commands::text::wrapped,
    config::{Datapath, OnDown},
    policy::fast::Hook,
    policy::net::Family,
};

/// Everything about one packet. The names are those of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes to.
    pub destination: IpAddr,
    /// Its family.
    pub family: Family,
    /// Its layer 3 length, in bytes.
    pub length: u32,
    /// Its hop limit (TTL).
    pub hop_limit: u8,
    /// Where the program sees it: entering the host, or about to leave by an uplink.
    pub hook: Hook,
    /// At which device; none if there is none.
    pub device: Option<String>,
    /// Why this device.
    pub device_because: String,
    /// The datapath in force.
    pub datapath: Datapath,
    /// The policies whose prefixes hold the source, the longest prefix first, up to the one that applies.
    pub policies: Vec<Considered>,
    /// The tunnels of the policy that applies, in order of preference.
    pub tunnels: Vec<Candidate>,
    /// What that policy says for when none is up.
    pub on_down: Option<OnDown>,
    /// The closed gates, and what to do about each.
    pub gates: Vec<String>,
    /// What the loaded program says; none where none runs.
    pub program: Option<ProgramSays>,
    /// Why there is no program.
    pub no_program: Option<String>,
    /// What the kernel's rules say.
    pub kernel: KernelSays,
    /// Do the program, the kernel and the configuration agree?
    pub agree: bool,
    /// In which respect, or why not.
    pub because: String,
}

/// A policy that was considered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// Its name.
    pub policy: String,
    /// Its longest prefix that holds the source.
    pub prefix: IpNet,
    /// The exempt destination that holds the packet's.
    pub exempt: Option<IpNet>,
    /// It applies; otherwise it is passed over, as exempt, or since it is down and says `next`.
    pub applies: bool,
    /// It says `via = "main"`, so no policy applies.
    pub main: bool,
}

/// A tunnel that a policy may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The device's name.
    pub tunnel: String,
    /// `up`, `down`, `failed` or `pending`, as in `status`; `unable` if it cannot carry this family.
    pub state: String,
    /// Why it is unable.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub because: Option<String>,
    /// The largest packet of this family, in bytes.
    pub mtu: Option<u32>,
    /// The gateway.
    pub gateway: Option<IpAddr>,
    /// It carries the policy's packets.
    pub chosen: bool,
}

/// A way out of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The device.
    pub device: String,
    /// The neighbour; none where the destination is the next hop itself.
    pub gateway: Option<IpAddr>,
}

/// What the program says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramSays {
    /// Does it act on what it decides?
    pub acts: bool,
    /// `leaves`, `dropped` or `left` (to the kernel).
    pub decision: String,
    /// It is decided as XDP, before the kernel has made an skb.
    #[serde(default)]
    pub xdp: bool,
    /// The outcome that it counts, as in `status`; none where the source is no policy's.
    pub outcome: Option<String>,
    /// Where it sends the packet.
    pub way: Option<Way>,
}

/// What the kernel says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelSays {
    /// `leaves`, `local`, `unreachable`, `prohibited`, `dropped` or `no route`.
    pub decision: String,
    /// Where it sends the packet.
    pub way: Option<Way>,
    /// The rule that decides, in `ip rule` syntax, as far as it can be told.
    pub rule: Option<String>,
    /// The route that decides, in `ip route` syntax.
    pub route: Option<String>,
}

/// The width of the labels.
const LABELS: usize = 11;
/// The width of a terminal.
const COLUMNS: usize = 80;

/// Lines with labels.
struct Lines(String);

impl Lines {
    fn add(&mut self, label: &str, text: &str) {
        let mut label = label;
        for line in wrapped(text, COLUMNS - LABELS, 2) {
            // Writing to a string does not fail.
            let _infallible = writeln!(self.0, "{}", format!("{label:<LABELS$}{line}").trim_end());
            label = "";
        }
    }

    fn gap(&mut self) {
        self.0.push('\n');
    }
}

impl Explanation {
    /// The explanation as a person reads it.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let mut lines = Lines(String::new());
        let Self { source, destination, length, hop_limit, .. } = self;
        lines.add("Packet", &format!("{source} to {destination}"));
        lines.add("", &format!("UDP, {length} bytes, hop limit {hop_limit}"));
        let place = match self.hook {
            Hook::Ingress => "Enters by",
            Hook::Egress => "Starts at",
        };
        let device = self.device.as_deref().map(|device| format!("{device}: ")).unwrap_or_default();
        lines.add(place, &format!("{device}{}", self.device_because));
        lines.gap();
        self.policy_lines(&mut lines);
        self.tunnel_lines(&mut lines);
        if self.gates.is_empty() {
            lines.add("Gates", "open");
        }
        for (index, gate) in self.gates.iter().enumerate() {
            lines.add(if index == 0 { "Gates" } else { "" }, gate);
        }
        lines.gap();
        lines.add("Program", &self.program_text());
        lines.add("Kernel", &self.kernel_text());
        for (what, text) in [("rule", &self.kernel.rule), ("route", &self.kernel.route)] {
            if let Some(text) = text {
                lines.add("", &format!("  {what:<6}{text}"));
            }
        }
        lines.gap();
        let (verdict, code) = if self.agree { ("they agree", "32") } else { ("they DISAGREE", "1;31") };
        let text = format!("{verdict}: {}", self.because);
        lines.add("Verdict", &text);
        if colour {
            lines.0 = lines.0.replacen(verdict, &format!("\x1b[{code}m{verdict}\x1b[0m"), 1);
        }
        lines.0
    }

    fn policy_lines(&self, lines: &mut Lines) {
        if self.policies.is_empty() {
            lines.add("Policy", "none: the source is in no policy's prefix");
        }
        for (index, Considered { policy, prefix, exempt, applies, main }) in self.policies.iter().enumerate() {
            let fate = match (applies, exempt) {
                _ if *main => "leaves it to the main table: via = \"main\"".to_owned(),
                (true, _) => "applies".to_owned(),
                (false, Some(exempt)) => format!("does not apply: {exempt} is exempt"),
                (false, None) => "does not apply: no tunnel is up, and on-down = \"next\"".to_owned(),
            };
            lines.add(if index == 0 { "Policy" } else { "" }, &format!("{policy} by {prefix}: {fate}"));
        }
        if !self.policies.is_empty() && self.policies.iter().all(|considered| !considered.applies) {
            lines.add("", "so none applies, and the other rules decide");
        }
    }

    fn tunnel_lines(&self, lines: &mut Lines) {
        let Some(on_down) = self.on_down else { return };
        let names: usize = self.tunnels.iter().map(|candidate| candidate.tunnel.len()).max().unwrap_or(0);
        for (index, candidate) in self.tunnels.iter().enumerate() {
            let Candidate { tunnel, state, because, mtu, gateway, chosen } = candidate;
            let state = match state.as_str() {
                "failed" => "does not answer its probes",
                "pending" => "there is no such device yet",
                state => because.as_deref().unwrap_or(state),
            };
            let mut text = format!("{tunnel:<names$}  {state}");
            if let Some(gateway) = gateway {
                text += &format!(", via {gateway}");
            }
            if let Some(mtu) = mtu {
                text += &format!(", MTU {mtu}");
                text += if self.length > *mtu { ": too small for the packet" } else { "" };
            }
            if *chosen {
                text += ", chosen: the first of `via` that is up";
            }
            lines.add(if index == 0 { "Tunnel" } else { "" }, &text);
        }
        if self.tunnels.iter().all(|candidate| !candidate.chosen) {
            let on_down = match on_down {
                OnDown::Unreachable => "unreachable",
                OnDown::Blackhole => "blackhole",
                OnDown::Prohibit => "prohibit",
                OnDown::Next => "next",
            };
            lines.add("", &format!("none is up: on-down = \"{on_down}\""));
        }
    }

    fn program_text(&self) -> String {
        let Some(program) = &self.program else {
            return format!("none: {}", self.no_program.as_deref().unwrap_or("nothing is loaded"));
        };
        let outcome = program.outcome.as_deref().map(|outcome| format!(" ({outcome})")).unwrap_or_default();
        let text = match (program.decision.as_str(), &program.way) {
            ("leaves", Some(way)) => format!("leaves {way}{outcome}"),
            ("dropped", _) => format!("dropped{outcome}"),
            _ if program.outcome.is_none() => "left to the kernel: no policy's source, or special".to_owned(),
            _ => format!("left to the kernel{outcome}"),
        };
        let text = if program.xdp { format!("{text}, as XDP") } else { text };
        match (program.acts, self.hook) {
            (false, _) => format!("{text}; but it only watches (shadow)"),
            (true, Hook::Ingress) => text,
            (true, Hook::Egress) => format!("if it got to the uplink: {text}"),
        }
    }

    fn kernel_text(&self) -> String {
        match (self.kernel.decision.as_str(), &self.kernel.way) {
            (_, Some(way)) => format!("leaves {way}"),
            ("local", _) => "for this host".to_owned(),
            (decision, _) => decision.to_owned(),
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "by {}", self.device)?;
        match self.gateway {
            Some(gateway) => write!(f, " via {gateway}"),
            None => Ok(()),
        }
    }
}
