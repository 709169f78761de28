//! `tunroute doctor`: what on this host keeps a configuration from working, the effect of it, and the fix.
//!
//! [`Observation::take`] observes, [`examine()`] is pure, and only [`Setting::apply`] changes anything.

mod examine;
mod network_manager;
mod observe;
mod path;
#[cfg(test)]
mod tests;

use std::{fmt, fs, io, path::Path};

use serde::Serialize;

pub use self::{
    examine::examine,
    observe::{Observation, OwnAddress, Settings},
    path::Narrow,
};
use crate::commands::text::wrapped;

/// Width of the printed report, in columns.
const WIDTH: usize = 80;

/// How much is at stake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Packets do not arrive, or leave where they must not.
    Problem,
    /// It works, but slower or with less certainty.
    Warning,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much is at stake.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// What follows from it.
    pub effect: String,
    /// The command or the setting that puts it right.
    pub fix: String,
    /// A setting that `--fix` makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setting: Option<Setting>,
}

/// A setting of the kernel, and what it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Setting {
    /// Its path below `/proc/sys/net`.
    pub path: String,
    /// The right value.
    pub value: i64,
}

impl Setting {
    /// Makes the setting, until the next boot.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn apply(&self) -> io::Result<()> {
        fs::write(Path::new("/proc/sys/net").join(&self.path), self.value.to_string())
    }
}

/// As a line of `sysctl.conf`: with slashes where a device's name has a dot.
impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, value } = self;
        if path.contains('.') {
            write!(f, "net/{path}={value}")
        } else {
            write!(f, "net.{}={value}", path.replace('/', "."))
        }
    }
}

impl Finding {
    fn line(text: &mut String, label: &str, what: &str) {
        for line in wrapped(&format!("{label}{what}"), WIDTH, 12) {
            text.push_str(&line);
            text.push('\n');
        }
    }

    /// As a person reads it.
    fn render(&self, colour: bool) -> String {
        let mut text = String::new();
        let (word, code) = match self.severity {
            Severity::Problem => ("problem", "31"),
            Severity::Warning => ("warning", "33"),
        };
        Self::line(&mut text, &format!("{word}: "), &self.what);
        if colour {
            text = text.replacen(word, &format!("\x1b[{code}m{word}\x1b[0m"), 1);
        }
        Self::line(&mut text, "    effect: ", &self.effect);
        Self::line(&mut text, "    fix:    ", &self.fix);
        text
    }
}

/// The findings as a person reads them, and the settings that `--fix` has made.
#[must_use]
pub fn report(findings: &[Finding], made: &[Setting], colour: bool) -> String {
    let mut text: String = findings.iter().map(|finding| finding.render(colour) + "\n").collect();
    if !made.is_empty() {
        text += "fixed until the next boot; to keep it, write to /etc/sysctl.d/90-tunroute.conf:\n";
        made.iter().for_each(|setting| text += &format!("    {setting}\n"));
        text += "\n";
    }
    let of = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let (problems, warnings) = (of(Severity::Problem), of(Severity::Warning));
    let plural = |number: usize, word: &str| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
    text += &match findings.len() {
        0 => "nothing found that keeps the configuration from working".to_owned(),
        _ => format!("{}, {}", plural(problems, "problem"), plural(warnings, "warning")),
    };
    let fixable = findings.iter().filter(|finding| finding.setting.is_some()).count();
    if fixable > 0 && made.is_empty() {
        text += &format!("; `tunroute doctor --fix` fixes {fixable}");
    }
    text + "\n"
}
