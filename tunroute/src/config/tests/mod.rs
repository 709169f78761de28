//! What is refused and how that is said, and what is taken.

mod accepted;
mod invariants;
mod refused;
mod reports;

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

#[track_caller]
fn take(text: &str) -> Loaded {
    Loaded::parse("t.toml", text).unwrap_or_else(|error| panic!("{text}\n{error}"))
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
