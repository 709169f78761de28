//! Whole reports, as people see them.

use insta::assert_snapshot;

use super::{refuse, take};

#[test]
fn host_bits() {
    let text = "[tunnel.sixxs0]\n\n[[policy]]\nname = \"tunnel0\"\nfrom = [\n  \"2a02::1/48\",\n]\nvia = \"sixxs0\"\n";
    assert_snapshot!(refuse(text).render(false));
}

#[test]
fn two_places() {
    let text = "[tunnel.t]\n[[policy]]\nname = \"a\"\nvia = \"t\"\nfrom = [\"2a02::1\", \"2a02::2\"]\n\n[[policy]]\n\
                name = \"b\"\nvia = \"t\"\nfrom = \"2a02::2\"\n";
    assert_snapshot!(refuse(text).render(false));
}

#[test]
fn several() {
    let text = "datapth = \"both\"\n[interfaces]\nuplink = \"net0 \"\n[tunnel.t]\nprobe = { target = \"192.0.2.1\", interval = 5 }\n";
    assert_snapshot!(refuse(text).render(false));
}

#[test]
fn one_line_each() {
    let text = "datapth = \"both\"\n[interfaces]\nuplink = \"net0 \"\n";
    assert_snapshot!(refuse(text).to_string());
}

#[test]
fn long_line() {
    let middle: Vec<String> = (0..5000).map(|i| format!("\"2001:db8:{i:x}::/48\"")).collect();
    let text = super::from(&format!("[\"10.0.0.0/8\", {}, \"10.0.0.0/8\"]", middle.join(", ")), "");
    assert_snapshot!(refuse(&text).render(false));
}

#[test]
fn warning() {
    assert_snapshot!(take("[tunnel.wg0]\n").warnings.first().map(|warning| warning.render(false)).unwrap_or_default());
}

#[test]
fn colour() {
    let error = refuse("band = 0");
    assert!(error.render(true).contains('\u{1b}'));
    // Neither the file nor a value in it can send anything to the terminal.
    let error = refuse("band = \"a\u{9b}31m\u{202e}\"\nx = \"\\u001b[2J\"\n[tunnel.\"\\u001b]0;x\"]\n");
    let report = error.render(false) + &error.to_string();
    assert!(!report.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{report:?}");
}
