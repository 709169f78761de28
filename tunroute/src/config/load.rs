//! From a file to a configuration, or to everything that is wrong with it.

use std::{ops::Range, path::Path};

use toml::de::DeTable;

use super::{
    Config, check, doubts, file, parse,
    report::{ConfigError, Finding, Findings, Problem, quote},
};

/// A configuration, and what should be said about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The validated configuration.
    pub config: Config,
    /// What is allowed, but hardly meant: at most 100.
    pub warnings: Vec<Problem>,
}

impl Config {
    /// Reads a file; [`Loaded::load`] also returns the warnings.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Loaded::load(path).map(|loaded| loaded.config)
    }

    /// Reads a text; [`Loaded::parse`] also returns the warnings.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the text, in reports that call it `name`.
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigError> {
        Loaded::parse(name, text).map(|loaded| loaded.config)
    }
}

impl Loaded {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let bytes =
            file::read(path).map_err(|refusal| ConfigError::unreadable(&name, &refusal.message, &refusal.help))?;
        match str::from_utf8(&bytes) {
            Ok(text) => Self::parse_in(path.parent().unwrap_or(Path::new("")), &name, text),
            Err(error) => {
                let start = error.valid_up_to();
                let end = start + error.error_len().unwrap_or(bytes.len() - start);
                let shown: Vec<String> =
                    bytes.get(start..end).unwrap_or_default().iter().map(|byte| format!("{byte:02x}")).collect();
                let message = format!("not UTF-8: the byte {} at offset {start}", shown.join(" "));
                let mut findings = Findings::default();
                findings.error(Finding::new(&(start..end), message, "save the file as UTF-8"));
                Err(findings.fail(&name, &bytes))
            }
        }
    }

    /// Reads a text, which names other files from the working directory on.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the text, in reports that call it `name`.
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigError> {
        Self::parse_in(Path::new(""), name, text)
    }

    /// Reads a text, which names other files from a directory on.
    fn parse_in(directory: &Path, name: &str, text: &str) -> Result<Self, ConfigError> {
        let mut findings = Findings::default();
        let (root, errors) = DeTable::parse_recoverable(text);
        // A duplicate key leaves the first value in place, so everything else can still be looked at.
        let readable = errors.iter().all(|error| error.message() == DUPLICATE);
        for error in errors {
            findings.error(syntax(error.message(), error.span(), text));
        }
        if !readable {
            return Err(findings.fail(name, text.as_bytes()));
        }
        let (mut config, spans) = parse::document(root.get_ref(), directory, &mut findings);
        check::check(&config, &spans, &mut findings);
        if findings.is_good() {
            doubts::doubts(&config, &spans, &mut findings);
        }
        let warnings = findings.finish(name, text.as_bytes())?;
        for policy in &mut config.policies {
            // Until here they stood beside their places in the file.
            policy.from.sort();
        }
        Ok(Self { config, warnings })
    }
}

/// How toml names a key that is given twice.
const DUPLICATE: &str = "duplicate key";

/// An error of the TOML parser.
fn syntax(message: &str, span: Option<Range<usize>>, text: &str) -> Finding {
    let span = span.unwrap_or(text.len()..text.len());
    if message == DUPLICATE {
        let key = text.get(span.clone()).unwrap_or_default();
        let help = "remove one of the two, or join them: a key, and a [table], may be written once";
        return Finding::new(&span, format!("{} is already there", quote(key)), help);
    }
    let (what, expected) = message.split_once(", expected ").unwrap_or((message, ""));
    let help = match what {
        "string values must be quoted" => {
            let value = text.get(span.clone()).unwrap_or_default();
            format!("write \"{}\"", quote(value).trim_matches('`'))
        }
        _ if expected.is_empty() => "see https://toml.io for how to write it".to_owned(),
        _ => format!("expected here: {expected}"),
    };
    Finding::new(&span, format!("syntax error: {what}"), help)
}
