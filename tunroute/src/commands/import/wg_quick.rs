//! `wg-quick` files, as the commands that `wg-quick up` runs (wg-quick(8)).

use super::{files::Reader, ini::sections};

/// The table of a tunnel that takes everything, which is also its mark (`add_default()` in wireguard-tools'
/// `wg-quick/linux.bash`; it takes the next one that is free).
const DEFAULT_TABLE: u32 = 51_820;

/// Does what `wg-quick up` would do; the device has the file's name.
pub(super) fn read(text: &str, device: &str, reader: &mut Reader<'_>) {
    let sections = sections(text);
    let all = |section: &'static str, key: &'static str| {
        let of = sections.iter().filter(move |found| found.name.eq_ignore_ascii_case(section));
        of.flat_map(move |found| found.of(key)).map(|found| (found.line, without_comment(&found.value)))
    };
    let hooks = |reader: &mut Reader<'_>, key| {
        for (line, hook) in all("Interface", key) {
            reader.script(&hook.replace("%i", device), line, &[]);
        }
    };
    hooks(reader, "PreUp");
    for (line, address) in all("Interface", "Address").flat_map(list) {
        reader.on_link(address, device, line);
    }
    let table = all("Interface", "Table").last().map_or("auto", |(_, table)| table);
    for (line, allowed) in all("Peer", "AllowedIPs").flat_map(list).filter(|_| table != "off") {
        let family = if allowed.contains(':') { "-6" } else { "-4" };
        let mut ip = |command: String| reader.ip(&format!("{family} {command}"), line);
        match table {
            "auto" if allowed.ends_with("/0") => {
                ip(format!("route append {allowed} dev {device} table {DEFAULT_TABLE}"));
                ip(format!("rule add not fwmark {DEFAULT_TABLE} table {DEFAULT_TABLE}"));
                ip("rule add table main suppress_prefixlength 0".to_owned());
            }
            "auto" => ip(format!("route append {allowed} dev {device}")),
            table => ip(format!("route append {allowed} dev {device} table {table}")),
        }
    }
    hooks(reader, "PostUp");
}

fn without_comment(value: &str) -> &str {
    value.split('#').next().unwrap_or(value).trim()
}

/// `A, B`, with the line that it stands on.
fn list((line, values): (usize, &str)) -> impl Iterator<Item = (usize, &str)> {
    values.split(',').map(str::trim).filter(|item| !item.is_empty()).map(move |item| (line, item))
}
