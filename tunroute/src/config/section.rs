//! Reading a TOML table key by key: everything that is not as it should be is noted, and reading goes on.

use std::time::Duration;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    keys::Key,
    report::{Finding, Findings, Refusal, Span, quote},
    values,
};

/// A value and where it stands.
pub(super) type Item<'t> = Spanned<DeValue<'t>>;

/// A table of the file.
pub(super) struct Section<'a, 't> {
    table: &'a DeTable<'t>,
    keys: &'static [Key],
    /// How the file writes it: `[[policy]]`.
    place: &'static str,
    /// Its header, or the whole of an inline table.
    pub(super) span: Span,
}

/// The value of a key.
pub(super) struct Field<'a, 't> {
    key: &'static Key,
    item: &'a Item<'t>,
}

/// The candidate that was probably meant.
pub(super) fn nearest<'c>(text: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    // Comparing is quadratic in the length; no name is this long.
    if text.len() > 64 {
        return None;
    }
    let distance = |candidate: &str| strsim::damerau_levenshtein(&text.to_lowercase(), &candidate.to_lowercase());
    let (distance, nearest) = candidates.map(|candidate| (distance(candidate), candidate)).min()?;
    (distance <= (text.chars().count() / 3).max(1)).then_some(nearest)
}

/// `` `a`, `b` or `c` ``
pub(super) fn either<'c>(candidates: impl Iterator<Item = &'c str>) -> String {
    let quoted: Vec<String> = candidates.map(quote).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        Some((only, _)) => only.clone(),
        None => String::new(),
    }
}

/// The type of a value, with its article.
fn type_of(value: &DeValue<'_>) -> String {
    match value {
        DeValue::Integer(_) => "an integer".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        other => format!("a {}", other.type_str()),
    }
}

impl<'a, 't> Section<'a, 't> {
    /// Takes a table; keys that it may not have are errors.
    pub(super) fn new(
        table: &'a DeTable<'t>,
        keys: &'static [Key],
        place: &'static str,
        span: Span,
        findings: &mut Findings,
    ) -> Self {
        for (key, value) in table {
            let name = key.get_ref();
            if keys.iter().any(|known| known.name == name) {
                continue;
            }
            let names = || keys.iter().map(|known| known.name);
            let help = match nearest(name, names()) {
                Some(nearest) => format!("did you mean `{nearest}`?"),
                // `[tunnel.eth0.100]` is a table in a table.
                None if place == "[tunnel.NAME]" && value.get_ref().is_table() => {
                    "quote a device name with a dot in it: [tunnel.\"eth0.100\"]".to_owned()
                }
                None => format!("{place} may have {}", either(names())),
            };
            findings.error(Finding::new(&key.span(), format!("unknown key {} in {place}", quote(name)), help));
        }
        Self { table, keys, place, span }
    }

    /// The value of a key, if the table has it.
    pub(super) fn get(&self, name: &str) -> Option<Field<'a, 't>> {
        let key = self.keys.iter().find(|key| key.name == name)?;
        self.table.get(name).map(|item| Field { key, item })
    }

    /// The value of a key that the table must have.
    pub(super) fn require(&self, name: &str, findings: &mut Findings) -> Option<Field<'a, 't>> {
        let field = self.get(name);
        if field.is_none() {
            let example = self.keys.iter().find(|key| key.name == name).map_or(name, |key| key.example);
            let message = format!("{} without {}", self.place, quote(name));
            findings.error(Finding::new(&self.span, message, format!("add it, for example: {example}")));
        }
        field
    }
}

impl<'a, 't> Field<'a, 't> {
    pub(super) fn span(&self) -> Span {
        self.item.span()
    }

    pub(super) fn value(&self) -> &'a DeValue<'t> {
        self.item.get_ref()
    }

    /// Notes that the value, or one in it, is of a wrong type.
    pub(super) fn mistyped(&self, item: &Item<'_>, expected: &str, findings: &mut Findings) {
        let Key { name, example, .. } = self.key;
        let message = format!("`{name}` must be {expected}, not {}", type_of(item.get_ref()));
        findings.error(Finding::new(&item.span(), message, format!("write it like this: {example}")));
    }

    /// Notes that the value itself is of a wrong type.
    pub(super) fn mistyped_self(&self, expected: &str, findings: &mut Findings) {
        self.mistyped(self.item, expected, findings);
    }

    fn typed<T>(&self, value: Option<T>, expected: &str, findings: &mut Findings) -> Option<T> {
        if value.is_none() {
            self.mistyped(self.item, expected, findings);
        }
        value
    }

    pub(super) fn boolean(&self, findings: &mut Findings) -> Option<bool> {
        self.typed(self.value().as_bool(), "true or false", findings)
    }

    pub(super) fn string(&self, findings: &mut Findings) -> Option<&'a str> {
        self.typed(self.value().as_str(), "a string", findings)
    }

    pub(super) fn integer(&self, findings: &mut Findings) -> Option<u32> {
        let integer = self.typed(self.value().as_integer(), "an integer", findings)?;
        let value = u32::from_str_radix(integer.as_str(), integer.radix()).map_err(|_| {
            Refusal::new(
                format!("`{}` is out of range", self.key.name),
                format!("write a number from 0 to {}: {}", u32::MAX, self.key.example),
            )
        });
        findings.accept(value, &self.span())
    }

    pub(super) fn duration(&self, findings: &mut Findings) -> Option<Duration> {
        if let Some(number) = self.value().as_integer() {
            let (message, help) = (
                format!("`{}` has no unit", self.key.name),
                format!("write \"{number}s\" for seconds or \"{number}ms\" for milliseconds"),
            );
            findings.error(Finding::new(&self.span(), message, help));
            return None;
        }
        let text = self.typed(self.value().as_str(), "a duration with its unit", findings)?;
        findings.accept(values::duration(text), &self.span())
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(&self, choices: &[(&'static str, T)], findings: &mut Findings) -> Option<T> {
        let text = self.string(findings)?;
        let found = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let words = || choices.iter().map(|(word, _)| *word);
            let help = match nearest(text, words()) {
                Some(nearest) => format!("did you mean \"{nearest}\"?"),
                None => format!("write {}", either(words())),
            };
            let message = format!("{} is no value for `{}`", quote(text), self.key.name);
            findings.error(Finding::new(&self.span(), message, help));
        }
        found
    }

    /// A list of strings.
    pub(super) fn list(&self, findings: &mut Findings) -> Option<Vec<(&'a str, Span)>> {
        let items = self.typed(self.value().as_array(), "a list of strings", findings)?;
        let mut strings = Vec::with_capacity(items.len());
        for item in items {
            match item.get_ref().as_str() {
                Some(text) => strings.push((text, item.span())),
                None => self.mistyped(item, "a list of strings", findings),
            }
        }
        Some(strings)
    }

    /// A string or a list of strings.
    pub(super) fn one_or_more(&self, findings: &mut Findings) -> Option<Vec<(&'a str, Span)>> {
        match self.value() {
            DeValue::String(text) => Some(vec![(text, self.span())]),
            DeValue::Array(_) => self.list(findings),
            _ => self.typed(None, "a string or a list of strings", findings),
        }
    }

    /// As [`Field::one_or_more`], but an empty list is an error.
    pub(super) fn at_least_one(&self, findings: &mut Findings) -> Option<Vec<(&'a str, Span)>> {
        if self.value().as_array().is_some_and(|items| items.is_empty()) {
            let Key { name, example, .. } = self.key;
            let (message, help) = (format!("`{name}` is empty"), format!("write at least one: {example}"));
            findings.error(Finding::new(&self.span(), message, help));
            return None;
        }
        self.one_or_more(findings)
    }

    /// A table, or a list of tables.
    pub(super) fn tables(&self, findings: &mut Findings) -> Vec<(&'a DeTable<'t>, Span)> {
        let items = match self.value() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![self.item],
        };
        let mut tables = Vec::with_capacity(items.len());
        for item in items {
            match item.get_ref().as_table() {
                Some(table) => tables.push((table, item.span())),
                None => self.mistyped(item, "a table or a list of tables", findings),
            }
        }
        tables
    }
}
