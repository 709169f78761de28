//! `wg-quick` files, as the commands that `wg-quick up` gives (wg-quick(8)).

use std::fmt::Write as _;

use super::ini::sections;

/// The table of a tunnel that takes everything, which is also its mark (`add_default()` in wireguard-tools'
/// `wg-quick/linux.bash`; it takes the next one that is free).
const DEFAULT_TABLE: u32 = 51_820;

/// The `ip` commands; the device has the file's name.
pub(super) fn commands(text: &str, device: &str) -> String {
    let sections = sections(text);
    let of = |name: &'static str| sections.iter().filter(move |section| section.name.eq_ignore_ascii_case(name));
    let values = |section: &'static str, key: &'static str| {
        of(section).flat_map(move |section| section.values(key)).map(without_comment).collect::<Vec<_>>()
    };
    let mut script = String::new();
    let hooks = |script: &mut String, key: &'static str| {
        for hook in values("Interface", key) {
            let _infallible = writeln!(script, "{}", hook.replace("%i", device));
        }
    };
    hooks(&mut script, "PreUp");
    for address in lists(&values("Interface", "Address")) {
        if let Ok(net) = address.parse::<ipnet::IpNet>()
            && net.prefix_len() < net.max_prefix_len()
        {
            let _infallible = writeln!(script, "ip route add {} dev {device}", net.trunc());
        }
    }
    let table = values("Interface", "Table").last().copied().unwrap_or("auto");
    for allowed in lists(&values("Peer", "AllowedIPs")).into_iter().filter(|_| table != "off") {
        let ip = if allowed.contains(':') { "ip -6" } else { "ip -4" };
        let _infallible = match table {
            "auto" if allowed.ends_with("/0") => writeln!(
                script,
                "{ip} route add {allowed} dev {device} table {DEFAULT_TABLE}\n\
                 {ip} rule add not fwmark {DEFAULT_TABLE} table {DEFAULT_TABLE}\n\
                 {ip} rule add table main suppress_prefixlength 0"
            ),
            "auto" => writeln!(script, "{ip} route add {allowed} dev {device}"),
            table => writeln!(script, "{ip} route add {allowed} dev {device} table {table}"),
        };
    }
    hooks(&mut script, "PostUp");
    script
}

fn without_comment(value: &str) -> &str {
    value.split('#').next().unwrap_or(value).trim()
}

/// `A, B`, once or several times.
fn lists<'v>(values: &[&'v str]) -> Vec<&'v str> {
    values.iter().flat_map(|value| value.split(',')).map(str::trim).filter(|item| !item.is_empty()).collect()
}
