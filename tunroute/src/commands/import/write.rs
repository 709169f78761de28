//! A draft as a configuration file, with comments for the person who goes on with it.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
};

use super::draft::{Draft, Policy, short};
use crate::{commands::text::wrapped, config::OnDown};

const HEAD: &str = "\
# Written by `tunroute import`. Next steps:
#
#   tunroute check FILE   check this file
#   tunroute plan FILE    show what it would change (changes nothing)
#
# Then copy it to /etc/tunroute/tunroute.toml and start the daemon. It adds its
# rules and tables beside those made by hand, so no traffic is interrupted. The
# commands at the end of this file remove what was made by hand.
";
const ADVICE: &str = "\
# Two settings keep today's behaviour. Safer ones are:
#
# on-down = \"unreachable\" drops a policy's packets while its tunnel is down.
# \"next\" sends them by the main table, as a table without a route does; most
# providers drop sources that are not theirs.
#
# exempt = [\"connected\"] (the default) delivers packets for the networks on the
# ingress interfaces directly. exempt = [] sends them into the tunnel.
";
const REMOVAL: &str = "
# Once the daemon runs, these commands remove what was made by hand. Remove also
# what makes it at boot.
";
const WIDTH: usize = 80;

/// A string as TOML writes it.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// `["a", "b"]`, on several lines where it is long.
fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let quoted: Vec<String> = items.into_iter().map(|item| quoted(&item.to_string())).collect();
    let line = format!("[{}]", quoted.join(", "));
    if line.len() < WIDTH { line } else { format!("[\n    {},\n]", quoted.join(",\n    ")) }
}

/// A name as a TOML key.
fn key(name: &str) -> String {
    let bare = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if bare { name.to_owned() } else { quoted(name) }
}

/// A comment. The lines after the first are indented by more than a command is, so that none looks like one.
fn comment(text: &mut String, paragraph: &str) {
    for line in wrapped(paragraph, WIDTH - 2, 4) {
        let _infallible = writeln!(text, "# {line}");
    }
}

impl Draft {
    /// Whether there is no policy in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The number of policies, and of prefixes in them.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.policies.len(), self.policies.iter().map(|policy| policy.from.len()).sum())
    }

    /// What could not be expressed, and why.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The configuration file.
    #[must_use]
    pub fn write(&self) -> String {
        let mut text = format!("{HEAD}\n");
        if self.policies.iter().any(|policy| policy.way.on_down.is_none()) {
            text += ADVICE;
            text += "\n";
        }
        text += "[interfaces]\n";
        for (role, what, example, devices) in [
            ("ingress", "forwarded traffic enters here", "lan0", &self.ingress),
            ("uplink", "these sources must never leave here", "net0", &self.uplink),
        ] {
            let (sign, devices) = if devices.is_empty() { ("#! ", list([example])) } else { ("", list(devices)) };
            let _infallible = writeln!(text, "{sign}{role} = {devices} # {what}");
        }
        let devices: BTreeSet<&String> = self.tunnels.keys().map(|(device, _)| device).collect();
        for device in devices {
            let _infallible = writeln!(text, "\n[tunnel.{}]", key(device));
            let gateways = self.tunnels.iter().filter(|((of, _), _)| of == device).filter_map(|(_, gateway)| *gateway);
            let gateways: Vec<_> = gateways.collect();
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
            text += REMOVAL;
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
        "\n[[policy]]\nname = \"{name}\"\n# Was table {table}. Once that is empty, `table = {table}` can be added here.\n\
         from = {}\nvia = {}\non-down = \"{on_down}\"\nexempt = {}\n",
        list(from.iter().map(short)),
        list(&way.via),
        list(&way.exempt)
    );
}
