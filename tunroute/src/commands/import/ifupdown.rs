//! ifupdown's `interfaces` files, as the commands that `ifup` runs (interfaces(5)).

use super::{files::Reader, ini::lines};

/// A stanza `iface NAME …`.
struct Stanza {
    device: String,
    /// Options with their lines, in order.
    options: Vec<(usize, String, String)>,
}

/// Whether a file is one of ifupdown's.
pub(super) fn is_interfaces(text: &str) -> bool {
    let lines = lines(text);
    let first = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let begins = |word: &str| {
        matches!(word, "auto" | "iface" | "mapping" | "source" | "source-directory" | "rename" | "template")
            || word.starts_with("allow-")
            || word.starts_with("no-")
    };
    lines.first().is_some_and(|(_, line)| begins(&first(line))) && lines.iter().any(|(_, line)| first(line) == "iface")
}

/// Does what `ifup` would do with all interfaces.
pub(super) fn read(text: &str, reader: &mut Reader<'_>) {
    let mut stanza: Option<Stanza> = None;
    for (number, line) in lines(text) {
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((&line, ""));
        let value = value.trim();
        match key {
            "iface" => {
                let device = value.split_whitespace().next().unwrap_or_default().to_owned();
                let done = stanza.replace(Stanza { device, options: Vec::new() });
                done.iter().for_each(|stanza| stanza.up(reader));
            }
            "source" | "source-directory" => reader.note("it is not followed: import those files, too", number, &line),
            "auto" | "mapping" | "rename" | "template" | "no-auto-down" | "no-scripts" => {}
            _ if key.starts_with("allow-") => {}
            _ => {
                if let Some(stanza) = &mut stanza {
                    stanza.options.push((number, key.to_owned(), value.to_owned()));
                }
            }
        }
    }
    stanza.iter().for_each(|stanza| stanza.up(reader));
}

impl Stanza {
    fn up(&self, reader: &mut Reader<'_>) {
        let value = |wanted: &str| self.options.iter().find(|(_, key, _)| key == wanted).map(|(_, _, value)| value);
        // What the commands find in their environment.
        let variable = |key: &str| format!("IF_{}", key.to_uppercase().replace('-', "_"));
        let named = self.options.iter().map(|(_, key, value)| (variable(key), value.as_str()));
        let variables: Vec<(String, &str)> =
            [("IFACE".to_owned(), self.device.as_str())].into_iter().chain(named).collect();
        for (line, _, command) in self.options.iter().filter(|(_, key, _)| key == "pre-up") {
            reader.script(command, *line, &variables);
        }
        for (line, key, text) in &self.options {
            match (key.as_str(), value("netmask")) {
                ("address", Some(mask)) if !text.contains('/') => {
                    reader.on_link(&format!("{text}/{mask}"), &self.device, *line);
                }
                ("address", _) => reader.on_link(text, &self.device, *line),
                ("gateway", _) => reader.gateway(text, &self.device, *line),
                ("up" | "post-up", _) => reader.script(text, *line, &variables),
                _ => {}
            }
        }
    }
}
