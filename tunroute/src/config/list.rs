//! Prefixes in a file of their own, one in a line: a million of them are read on all processors.

use std::path::Path;

use ipnet::IpNet;
use rayon::prelude::*;

use super::{file, prefix, report::Refusal};

/// Reads a list of prefixes that packets can come from. Blank lines, and what follows a `#`, are passed over.
pub(super) fn sources(path: &Path, allow_default: bool) -> Result<Vec<IpNet>, Vec<Refusal>> {
    let name = path.display();
    let whole = |Refusal { message, help }| vec![Refusal::new(format!("{name} {message}"), help)];
    let bytes = file::read(path).map_err(whole)?;
    let text = str::from_utf8(&bytes).map_err(|error| {
        let line = bytes.get(..error.valid_up_to()).unwrap_or_default().split(|byte| *byte == b'\n').count();
        vec![Refusal::new(format!("{name}:{line}: not UTF-8"), "save the file as UTF-8")]
    })?;
    let lines: Vec<&str> = text.lines().collect();
    let read: Vec<_> = lines.par_iter().map(|line| source(line, allow_default)).collect();

    let mut prefixes = Vec::with_capacity(read.len());
    let mut refusals = Vec::new();
    for (number, result) in (1..).zip(read) {
        match result {
            Ok(prefix) => prefixes.extend(prefix),
            Err(Refusal { message, help }) => refusals.push(Refusal::new(format!("{name}:{number}: {message}"), help)),
        }
    }
    if refusals.is_empty() && prefixes.is_empty() {
        return Err(vec![Refusal::new(
            format!("{name} has no prefixes"),
            "write one in each line, such as 192.0.2.0/24",
        )]);
    }
    if refusals.is_empty() { Ok(prefixes) } else { Err(refusals) }
}

/// The prefix in a line, if there is one.
fn source(line: &str, allow_default: bool) -> Result<Option<IpNet>, Refusal> {
    let text = line.split('#').next().unwrap_or_default().trim();
    if text.is_empty() { Ok(None) } else { prefix::source(text, allow_default).map(Some) }
}
