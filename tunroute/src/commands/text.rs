//! Wraps text to the width of a terminal.

use textwrap::{Options, WordSeparator, WordSplitter, WrapAlgorithm};

/// Wraps a line at spaces only, so that names and commands stay whole. Lines after the first are indented by `hanging` more
/// columns.
#[must_use]
pub fn wrapped(line: &str, width: usize, hanging: usize) -> Vec<String> {
    let text = line.trim_start();
    let indent = line.len() - text.len();
    let (first, rest) = (" ".repeat(indent), " ".repeat(indent + hanging));
    // The default algorithm balances the lines and needs more of them.
    let options = Options::new(width)
        .wrap_algorithm(WrapAlgorithm::FirstFit)
        .word_separator(WordSeparator::AsciiSpace)
        .word_splitter(WordSplitter::NoHyphenation)
        .break_words(false)
        .initial_indent(&first)
        .subsequent_indent(&rest);
    textwrap::wrap(text, options).into_iter().map(Into::into).collect()
}
