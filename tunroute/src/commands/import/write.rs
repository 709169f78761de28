//! A draft as a file that a person goes on with.

use std::fmt::{self, Write as _};

use super::draft::{Draft, Policy};
use crate::{commands::text::wrapped, config::OnDown};

const HEAD: &str = "\
# Written by `tunroute import`. Next:
#
#   tunroute check FILE   is it right?
#   tunroute plan FILE    what would it change? (Nothing is changed yet.)
#
# and then put it to /etc/tunroute/tunroute.toml and start the daemon. Its rules
# and tables come beside those made by hand, so traffic goes on without a gap.
# At the end of this file are the commands that remove what was made by hand.
";
const ADVICE: &str = "\
# Two things are as they were, and better otherwise:
#
# on-down = \"next\" sends a policy's packets by the main table while its tunnel
# is down, as a table without a route does. The provider drops them at best.
# \"unreachable\" keeps them from leaving.
#
# exempt = [] sends by the tunnel what is for the networks on the ingress
# interfaces, too. Without this line it goes there directly.
";
const WIDTH: usize = 80;

/// `["a", "b"]`, on several lines where it is long.
fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let quoted: Vec<String> = items.into_iter().map(|item| format!("\"{item}\"")).collect();
    let line = format!("[{}]", quoted.join(", "));
    if line.len() < WIDTH { line } else { format!("[\n    {},\n]", quoted.join(",\n    ")) }
}

/// A name as a TOML key.
fn key(name: &str) -> String {
    let bare = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if bare { name.to_owned() } else { format!("\"{name}\"") }
}

/// A prefix as one writes it: without its length where it is one address.
fn short(prefix: &ipnet::IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() { prefix.addr().to_string() } else { prefix.to_string() }
}

fn comment(text: &mut String, paragraph: &str) {
    for line in wrapped(paragraph, WIDTH - 2, 2) {
        let _infallible = writeln!(text, "# {line}");
    }
}

impl Draft {
    /// Is there anything in it that a configuration can have?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// How many policies, and prefixes in them.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.policies.len(), self.policies.iter().map(|policy| policy.from.len()).sum())
    }

    /// What could not be expressed.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The file.
    #[must_use]
    pub fn write(&self) -> String {
        let mut text = format!("{HEAD}\n");
        if self.policies.iter().any(|policy| policy.way.on_down.is_none()) {
            text += ADVICE;
            text += "\n";
        }
        text += "[interfaces]\n";
        for (role, what, example, devices) in [
            ("ingress", "where forwarded traffic enters", "lan0", &self.ingress),
            ("uplink", "where these sources must never leave", "net0", &self.uplink),
        ] {
            let (sign, devices) = if devices.is_empty() { ("#! ", list([example])) } else { ("", list(devices)) };
            let _infallible = writeln!(text, "{sign}{role} = {devices} # {what}");
        }
        for (device, tunnel) in &self.tunnels {
            let _infallible = writeln!(text, "\n[tunnel.{}]", key(device));
            let gateways: Vec<String> = tunnel
                .via_v4
                .map(|via| via.to_string())
                .into_iter()
                .chain(tunnel.via_v6.map(|via| via.to_string()))
                .collect();
            if !gateways.is_empty() {
                let _infallible = writeln!(text, "via = {}", list(gateways));
            }
        }
        for policy in &self.policies {
            write_policy(&mut text, policy);
        }
        if !self.notes.is_empty() {
            text += "\n# Not expressed above:\n";
            self.notes.iter().for_each(|note| comment(&mut text, &format!("- {note}")));
        }
        if !self.removal.is_empty() {
            text += "\n# Once the daemon runs, these remove what was made by hand. (What makes it at\n# boot has to go, too.)\n";
            self.removal.iter().for_each(|command| {
                let _infallible = writeln!(text, "#   {command}");
            });
        }
        text
    }
}

fn write_policy(text: &mut String, policy: &Policy) {
    let Policy { name, table, from, way } = policy;
    let on_down = match way.on_down {
        None | Some(OnDown::Next) => "next",
        Some(OnDown::Unreachable) => "unreachable",
        Some(OnDown::Blackhole) => "blackhole",
        Some(OnDown::Prohibit) => "prohibit",
    };
    let _infallible = write!(
        text,
        "\n[[policy]]\nname = \"{name}\"\n# Until now table {table}; once that is empty, `table = {table}` may be written.\n\
         from = {}\nvia = {}\non-down = \"{on_down}\"\nexempt = {}\n",
        list(from.iter().map(short)),
        list(&way.via),
        list(&way.exempt)
    );
}
