//! The text of a configuration file, for excerpts in reports.

use std::ops::Range;

use miette::{MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents};

/// Longer lines are shown in part: a million prefixes may stand on one line.
const LONGEST_EXCERPT: usize = 1000;
/// May stand at the start of a file, and is no column of it.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// How much of a long line is shown on each side of what is underlined.
const MARGIN: usize = 60;

/// A text that can be shown on a terminal, with an index of its lines.
///
/// miette's own sources read the whole text again for each excerpt, and show whole lines.
#[derive(Debug)]
pub(super) struct Source {
    name: String,
    /// As many bytes as the file (and always a newline at the end), with harmless characters in the place of control
    /// characters and of what is not UTF-8.
    text: String,
    /// The offset of each line's first byte.
    lines: Vec<usize>,
}

/// A character of the same length in UTF-8 that has no effect on a terminal.
pub(crate) fn printable(c: char) -> char {
    let bidirectional = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    match (c.is_control() || bidirectional, c.len_utf8()) {
        (false, _) => c,
        (true, 1) => '?',
        (true, 2) => '·',
        (true, _) => char::REPLACEMENT_CHARACTER,
    }
}

impl Source {
    pub(super) fn new(name: &str, bytes: &[u8]) -> Self {
        let mut text = String::with_capacity(bytes.len() + 1);
        for chunk in bytes.utf8_chunks() {
            text.extend(chunk.valid().chars().map(|c| if matches!(c, '\n' | '\t') { c } else { printable(c) }));
            text.extend(chunk.invalid().iter().map(|_| '?'));
        }
        if !text.ends_with('\n') {
            // So that the end of the file, too, is a character that can be underlined.
            text.push('\n');
        }
        let starts = text.match_indices('\n').map(|(at, _)| at + 1).filter(|&start| start < text.len());
        let lines = std::iter::once(0).chain(starts).collect();
        Self { name: name.chars().map(printable).collect(), text, lines }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The text in a range, empty if there is no such range.
    pub(super) fn get(&self, range: Range<usize>) -> &str {
        self.text.get(range).unwrap_or_default()
    }

    /// The line (from 0) that an offset is in.
    fn line(&self, offset: usize) -> usize {
        self.lines.partition_point(|&start| start <= offset).saturating_sub(1)
    }

    /// Where a line starts; the end of the text for lines after the last.
    fn start(&self, line: usize) -> usize {
        self.lines.get(line).copied().unwrap_or(self.text.len())
    }

    /// How many characters stand before an offset in its line.
    fn column(&self, offset: usize) -> usize {
        self.get(self.start(self.line(offset))..offset).trim_start_matches(BYTE_ORDER_MARK).chars().count()
    }

    /// Line and column of an offset, both from 1, the column in characters.
    pub(super) fn position(&self, offset: usize) -> (usize, usize) {
        (self.line(offset) + 1, self.column(offset) + 1)
    }

    /// What is underlined for a range: no more than one line of it, and not too much of that.
    pub(super) fn underline(&self, range: &Range<usize>) -> Range<usize> {
        let start = self.text.floor_char_boundary(range.start.min(self.text.len().saturating_sub(1)));
        let end_of_line = self.start(self.line(start) + 1).saturating_sub(1);
        let end = range.end.min(end_of_line).min(start + MARGIN * 2).max(start);
        start..self.text.floor_char_boundary(end).max(start)
    }

    fn contents(&self, range: Range<usize>) -> Result<Box<dyn SpanContents<'_> + '_>, MietteError> {
        let (start, end) = (range.start, range.end);
        let data = self.text.get(range).ok_or(MietteError::OutOfBounds)?.as_bytes();
        let count = self.line(end.saturating_sub(1)).saturating_sub(self.line(start)) + 1;
        Ok(Box::new(MietteSpanContents::new_named(
            self.name.clone(),
            data,
            (start, end - start).into(),
            self.line(start),
            self.column(start),
            count,
        )))
    }
}

impl SourceCode for Source {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let (start, end) = (span.offset(), span.offset() + span.len());
        if before == 0 && after == 0 {
            return self.contents(start..end);
        }
        let first = self.start(self.line(start).saturating_sub(before));
        let last = self.start(self.line(end.saturating_sub(1).max(start)) + 1 + after);
        if last - first <= LONGEST_EXCERPT {
            return self.contents(first..last);
        }
        if end - start > LONGEST_EXCERPT {
            // Two places that are far apart on one line: they get an excerpt each.
            return Err(MietteError::OutOfBounds);
        }
        let from = start.saturating_sub(MARGIN).max(self.start(self.line(start)));
        let to = (end + MARGIN).min(self.start(self.line(end) + 1));
        self.contents(self.text.floor_char_boundary(from)..self.text.floor_char_boundary(to))
    }
}
