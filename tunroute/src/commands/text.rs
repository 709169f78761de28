//! Text that fits a terminal.

use textwrap::{Options, WordSeparator, WordSplitter, WrapAlgorithm};

/// Breaks a line at spaces only, so that names and commands stay whole; what follows the first line is indented by so
/// many columns more.
#[must_use]
pub fn wrapped(line: &str, width: usize, hanging: usize) -> Vec<String> {
    let text = line.trim_start();
    let indent = line.len() - text.len();
    let (first, rest) = (" ".repeat(indent), " ".repeat(indent + hanging));
    // The other algorithm evens the lines out, and so makes more of them.
    let options = Options::new(width)
        .wrap_algorithm(WrapAlgorithm::FirstFit)
        .word_separator(WordSeparator::AsciiSpace)
        .word_splitter(WordSplitter::NoHyphenation)
        .break_words(false)
        .initial_indent(&first)
        .subsequent_indent(&rest);
    textwrap::wrap(text, options).into_iter().map(Into::into).collect()
}
