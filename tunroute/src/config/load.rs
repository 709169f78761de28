//! From a file to a configuration, or to everything that is wrong with it.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use toml::de::DeTable;

use super::{
    Config, check, doubts, parse,
    report::{ConfigError, Finding, Findings, Problem, quote},
};

/// The largest file: room for two million prefixes.
const LARGEST: u64 = 64 << 20;

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
        let bytes = read(path, &name)?;
        match str::from_utf8(&bytes) {
            Ok(text) => Self::parse(&name, text),
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

    /// Reads a text.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the text, in reports that call it `name`.
    pub fn parse(name: &str, text: &str) -> Result<Self, ConfigError> {
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
        let (config, spans) = parse::document(root.get_ref(), &mut findings);
        check::check(&config, &spans, &mut findings);
        if findings.is_good() {
            doubts::doubts(&config, &spans, &mut findings);
        }
        let warnings = findings.finish(name, text.as_bytes())?;
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

/// The whole of a regular file.
fn read(path: &Path, name: &str) -> Result<Vec<u8>, ConfigError> {
    let fail = |message: &str, help: &str| ConfigError::unreadable(name, message, help);
    let failed = |error: io::Error| {
        let help = match error.kind() {
            io::ErrorKind::NotFound => "write the file, or name another with --config",
            io::ErrorKind::PermissionDenied => "run as root, or make the file readable",
            io::ErrorKind::IsADirectory => "name the file in it",
            _ => "make the file readable",
        };
        fail(&format!("cannot be read: {error}"), help)
    };
    // A FIFO that nobody writes to would block.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(fail("is a directory", "name the file in it"));
    }
    if !metadata.is_file() {
        return Err(fail("is not a regular file", "name a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LARGEST {
        let message = format!("is larger than {} MiB", LARGEST >> 20);
        return Err(fail(&message, "use shorter prefixes, which cover many sources each"));
    }
    Ok(bytes)
}
