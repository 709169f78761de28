//! The names of routing tables, as iproute2 finds them in `rt_tables` files.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::Setup;
use crate::policy::net::{TABLE_LOCAL, TABLE_MAIN};

/// The table that the kernel asks after the main one (`RT_TABLE_DEFAULT`).
pub(super) const TABLE_DEFAULT: u32 = 253;
/// The tables that the kernel and iproute2 name themselves.
const TABLES: [(&str, u32); 4] =
    [("local", TABLE_LOCAL), ("main", TABLE_MAIN), ("default", TABLE_DEFAULT), ("unspec", 0)];
/// Where iproute2 looks for more; the later one wins.
const DIRECTORIES: [&str; 2] = ["/usr/share/iproute2", "/etc/iproute2"];

/// The names of routing tables on this host, by number.
#[must_use]
pub fn table_names() -> BTreeMap<u32, String> {
    let mut files: Vec<PathBuf> = DIRECTORIES.iter().map(|dir| Path::new(dir).join("rt_tables")).collect();
    for dir in DIRECTORIES {
        let entries = fs::read_dir(Path::new(dir).join("rt_tables.d")).into_iter().flatten().flatten();
        files
            .extend(entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "conf")));
    }
    let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    texts.flat_map(|text| names(&text)).collect()
}

/// The entries of an `rt_tables` file, such as `200 sixxs0`.
pub(super) fn names(text: &str) -> Vec<(u32, String)> {
    text.lines().filter_map(name).collect()
}

fn name(line: &str) -> Option<(u32, String)> {
    let mut words = line.split('#').next()?.split_whitespace();
    Some((number(words.next()?)?, words.next()?.to_owned()))
}

/// Whether a text has names of tables and nothing else.
pub(super) fn is_names(text: &str) -> bool {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty());
    let mut named = lines.map(|line| name(line).is_some());
    named.next() == Some(true) && named.all(|named| named)
}

/// A number, as `ip` takes it: `0x` begins hexadecimal digits and `0` octal ones.
pub(super) fn number(text: &str) -> Option<u32> {
    match (text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")), text.strip_prefix('0')) {
        (Some(digits), _) => u32::from_str_radix(digits, 16).ok(),
        (None, Some(digits)) if !digits.is_empty() => u32::from_str_radix(digits, 8).ok(),
        _ => text.parse().ok(),
    }
    .filter(|_| !text.contains('+'))
}

impl Setup {
    /// The number of a table that is given by name or number.
    pub(super) fn table(&self, text: &str) -> Result<u32, String> {
        let named = self.names.iter().find(|(_, name)| *name == text).map(|(number, _)| *number);
        let known = || TABLES.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
        let number = named.or_else(known).or_else(|| number(text));
        number.ok_or_else(|| format!("no `rt_tables` file names a table `{text}`"))
    }
}
