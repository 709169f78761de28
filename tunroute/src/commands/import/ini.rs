//! Files with sections and assignments, as WireGuard's and systemd's are.

/// A section: its name, and its assignments in order.
pub(super) struct Section<'t> {
    pub(super) name: &'t str,
    assignments: Vec<(&'t str, &'t str)>,
}

/// Does a text begin with a section? A script that begins with a test has spaces in its brackets.
pub(super) fn is_ini(text: &str) -> bool {
    lines(text).next().is_some_and(|line| heading(line).is_some())
}

/// All sections. What stands before the first one is left out, and so is what is no assignment.
pub(super) fn sections(text: &str) -> Vec<Section<'_>> {
    let mut sections: Vec<Section<'_>> = Vec::new();
    for line in lines(text) {
        if let Some(name) = heading(line) {
            sections.push(Section { name, assignments: Vec::new() });
        } else if let (Some(section), Some((key, value))) = (sections.last_mut(), line.split_once('=')) {
            section.assignments.push((key.trim(), value.trim()));
        }
    }
    sections
}

/// The lines that say something.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
}

fn heading(line: &str) -> Option<&str> {
    let name = line.strip_prefix('[')?.split_once(']')?.0;
    (!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric())).then_some(name)
}

impl<'t> Section<'t> {
    /// All assignments, in order.
    pub(super) fn all(&self) -> impl Iterator<Item = (&'t str, &'t str)> {
        self.assignments.iter().copied()
    }

    /// The values of a key, in whatever case it is written.
    pub(super) fn values(&self, key: &str) -> impl Iterator<Item = &'t str> {
        self.all().filter(move |(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value)
    }

    /// The last value of a key.
    pub(super) fn value(&self, key: &str) -> Option<&'t str> {
        self.values(key).last()
    }
}
