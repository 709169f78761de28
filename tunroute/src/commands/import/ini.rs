//! Files with sections and assignments, as WireGuard's and systemd's are.

/// A section: its name, and its assignments in order.
pub(super) struct Section {
    /// The name in brackets.
    pub(super) name: String,
    /// The line of the heading.
    pub(super) line: usize,
    assignments: Vec<Assignment>,
}

/// `KEY = VALUE`
pub(super) struct Assignment {
    /// The line, from 1 on.
    pub(super) line: usize,
    /// The key as it is written.
    pub(super) key: String,
    /// The value, without the blanks around it.
    pub(super) value: String,
}

/// Whether a text begins with a section. A script that begins with a test has spaces in its brackets.
pub(super) fn is_ini(text: &str) -> bool {
    lines(text).first().is_some_and(|(_, line)| heading(line).is_some())
}

/// All sections. Lines before the first one, and lines that are no assignments, are left out.
pub(super) fn sections(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for (line, text) in lines(text) {
        if let Some(name) = heading(&text) {
            sections.push(Section { name: name.to_owned(), line, assignments: Vec::new() });
        } else if let (Some(section), Some((key, value))) = (sections.last_mut(), text.split_once('=')) {
            let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
            section.assignments.push(Assignment { line, key, value });
        }
    }
    sections
}

/// The lines that are neither empty nor comments, with their numbers. A backslash at the end of a line continues it.
pub(super) fn lines(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut continued = false;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if !continued && (line.is_empty() || line.starts_with(['#', ';'])) {
            continue;
        }
        let part = line.strip_suffix('\\').unwrap_or(line);
        match lines.last_mut().filter(|_| continued) {
            Some((_, whole)) => *whole = format!("{whole} {part}"),
            None => lines.push((number, part.to_owned())),
        }
        continued = line.ends_with('\\');
    }
    lines
}

fn heading(line: &str) -> Option<&str> {
    let name = line.strip_prefix('[')?.split_once(']')?.0;
    (!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric())).then_some(name)
}

impl Section {
    /// All assignments, in order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Assignment> {
        self.assignments.iter()
    }

    /// The assignments of a key, in upper or lower case.
    pub(super) fn of(&self, key: &str) -> impl Iterator<Item = &Assignment> {
        self.all().filter(move |assignment| assignment.key.eq_ignore_ascii_case(key))
    }

    /// The values of a key.
    pub(super) fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.of(key).map(|assignment| assignment.value.as_str())
    }

    /// The last value of a key.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        self.values(key).last()
    }
}
