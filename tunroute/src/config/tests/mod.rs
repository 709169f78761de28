//! What is refused, with which message, and what is accepted.

mod accepted;
mod doubts;
mod files;
mod invariants;
mod refused;
mod reports;
mod schema;

use std::sync::LazyLock;

use super::{Config, ConfigError, Loaded, Problem};

/// The one error in a text.
#[track_caller]
fn only_error(error: &ConfigError) -> &Problem {
    match error.problems() {
        [problem] => problem,
        several => panic!("{} errors:\n{error}", several.len()),
    }
}

#[track_caller]
fn refuse(text: &str) -> ConfigError {
    Config::parse("t.toml", text).expect_err(text)
}

/// What the parser takes, the schema takes, too.
#[track_caller]
fn take(text: &str) -> Loaded {
    assert!(valid(text), "the schema refuses {text}");
    Loaded::parse("t.toml", text).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// As [`take`], with the file of prefixes beside it that the examples name.
#[track_caller]
fn take_file(text: &str) -> Loaded {
    assert!(valid(text), "the schema refuses {text}");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tunroute.toml");
    for (file, content) in [(directory.path().join("prefixes.txt"), "198.51.100.0/24\n"), (path.clone(), text)] {
        std::fs::write(file, content).expect("it can be written");
    }
    Loaded::load(&path).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// Does the schema take it?
fn valid(text: &str) -> bool {
    static VALIDATOR: LazyLock<jsonschema::Validator> =
        LazyLock::new(|| jsonschema::draft202012::new(&super::schema()).expect("the schema is one"));
    toml::from_str::<serde_json::Value>(text).is_ok_and(|file| VALIDATOR.is_valid(&file))
}

/// A file with one policy, with this `from` and further lines.
fn from(value: &str, lines: &str) -> String {
    format!("[tunnel.t]\n[[policy]]\nname = \"p\"\nvia = \"t\"\nfrom = {value}\n{lines}\n")
}

/// A file with a policy that has these lines, too.
fn policy(lines: &str) -> String {
    from("\"2a02::1\"", lines)
}

/// A file with a tunnel that has these lines.
fn tunnel(lines: &str) -> String {
    format!("[[policy]]\nname = \"p\"\nvia = \"t\"\nfrom = \"2a02::1\"\n[tunnel.t]\n{lines}\n")
}

/// A file with a tunnel that has this probe.
fn probe(fields: &str) -> String {
    tunnel(&format!("probe = {{ {fields} }}"))
}
