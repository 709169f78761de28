//! systemd-networkd, which removes rules and routes that it has not made unless it is configured otherwise.

use std::{collections::BTreeMap, fs, path::Path};

/// Where networkd looks for its configuration, the weightiest first (networkd.conf(5)).
const DIRECTORIES: [&str; 4] = ["etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd"];
/// What makes it leave others' alone when it is off; both are on by default.
const SETTINGS: [&str; 2] = ["ManageForeignRoutingPolicyRules", "ManageForeignRoutes"];

/// What the operator is to do so that networkd leaves tunroute's rules and routes alone; none if it does not run or has
/// been told already. `root` is where the file system begins.
#[must_use]
pub fn hint(root: &Path) -> Option<String> {
    // While it runs it keeps its state there, however it was started.
    if !root.join("run/systemd/netif/state").exists() {
        return None;
    }
    let settings = settings(root);
    let on: Vec<&str> =
        SETTINGS.into_iter().filter(|name| settings.get(*name).is_none_or(|value| !is_off(value))).collect();
    if on.is_empty() {
        return None;
    }
    let lines: Vec<String> = on.iter().map(|name| format!("{name}=no")).collect();
    Some(format!(
        "systemd-networkd runs and removes rules and routes of others: write `[Network]` and below it `{}` to \
         /etc/systemd/networkd.conf.d/tunroute.conf, then `systemctl restart systemd-networkd`",
        lines.join("`, `")
    ))
}

/// The settings of `[Network]`: those of the main file, overridden by the drop-ins in the order of their names.
fn settings(root: &Path) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    // Of files with one name the weightiest counts alone, be it empty.
    let main =
        DIRECTORIES.iter().find_map(|directory| fs::read_to_string(root.join(directory).join("networkd.conf")).ok());
    read(&main.unwrap_or_default(), &mut settings);
    let mut drop_ins = BTreeMap::new();
    for directory in DIRECTORIES.iter().rev() {
        let entries = fs::read_dir(root.join(directory).join("networkd.conf.d")).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "conf")) {
            drop_ins.insert(path.file_name().map(ToOwned::to_owned), path);
        }
    }
    for path in drop_ins.values() {
        read(&fs::read_to_string(path).unwrap_or_default(), &mut settings);
    }
    settings
}

/// Enters the assignments of a file's `[Network]` sections.
fn read(text: &str, settings: &mut BTreeMap<String, String>) {
    let mut network = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            network = line == "[Network]";
        } else if network
            && !line.starts_with(['#', ';'])
            && let Some((name, value)) = line.split_once('=')
        {
            settings.insert(name.trim_end().to_owned(), value.trim_start().to_owned());
        }
    }
}

/// `parse_boolean()` in systemd's `src/basic/parse-util.c`; other values are ignored.
fn is_off(value: &str) -> bool {
    ["0", "no", "n", "false", "f", "off"].iter().any(|off| value.eq_ignore_ascii_case(off))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: (&str, &str) = ("run/systemd/netif/state", "OPER_STATE=routable\n");
    const BOTH_OFF: &str = "[Network]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes = False\n";
    const RULES_OFF: &str =
        "# rules\n[DHCPv4]\nManageForeignRoutes=no\n[Network]\nManageForeignRoutingPolicyRules=off\n";
    const BOTH_ON: &str = "[Network]\nManageForeignRoutingPolicyRules=yes\nManageForeignRoutes=yes\n";
    const ETC: &str = "etc/systemd/networkd.conf";

    #[test]
    fn the_hint_names_what_is_still_on() {
        let (rules, routes) = ("ManageForeignRoutingPolicyRules=no", "ManageForeignRoutes=no");
        type Files = &'static [(&'static str, &'static str)];
        let cases: &[(Files, &[&str])] = &[
            (&[], &[]),
            (&[(ETC, BOTH_ON)], &[]),
            (&[RUNNING], &[rules, routes]),
            (&[RUNNING, (ETC, BOTH_OFF)], &[]),
            (&[RUNNING, (ETC, RULES_OFF)], &[routes]),
            (
                &[RUNNING, (ETC, "[Network]\n#ManageForeignRoutes=no\nManageForeignRoutingPolicyRules=maybe")],
                &[rules, routes],
            ),
            // A drop-in overrides the main file, wherever it is; a later one an earlier one.
            (&[RUNNING, (ETC, BOTH_ON), ("usr/lib/systemd/networkd.conf.d/a.conf", BOTH_OFF)], &[]),
            (&[RUNNING, (ETC, BOTH_OFF), ("run/systemd/networkd.conf.d/a.conf", BOTH_ON)], &[rules, routes]),
            (
                &[
                    RUNNING,
                    ("etc/systemd/networkd.conf.d/10-a.conf", BOTH_ON),
                    ("usr/local/lib/systemd/networkd.conf.d/20-b.conf", BOTH_OFF),
                ],
                &[],
            ),
            // One name, two places: /etc counts, be it only to mask.
            (
                &[
                    RUNNING,
                    ("etc/systemd/networkd.conf.d/a.conf", ""),
                    ("usr/lib/systemd/networkd.conf.d/a.conf", BOTH_OFF),
                ],
                &[rules, routes],
            ),
            (&[RUNNING, ("etc/systemd/networkd.conf.d/a.conf.bak", BOTH_OFF)], &[rules, routes]),
        ];
        for (files, expected) in cases {
            let root = tempfile::tempdir().unwrap();
            for (path, text) in *files {
                let path = root.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            let hint = hint(root.path());
            assert_eq!(hint.is_some(), !expected.is_empty(), "{files:?}: {hint:?}");
            for setting in [rules, routes] {
                let named = hint.as_ref().is_some_and(|hint| hint.contains(&format!("`{setting}`")));
                assert_eq!(named, expected.contains(&setting), "{files:?}: {hint:?}");
            }
        }
    }
}
