//! What is wrong with a configuration, where, and what to write instead.

use std::{fmt, ops::Range, sync::Arc};

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, Severity};
use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::source::{Source, printable};

/// A range of bytes of the file.
pub(super) type Span = Range<usize>;

/// Errors beyond this number are counted, not kept, and warnings dropped: one slip in a generated list can make a million.
const MOST_FINDINGS: usize = 100;
/// How many characters of an offending value a message repeats.
const LONGEST_QUOTE: usize = 60;

/// A value in a message.
pub(super) fn quote(text: &str) -> String {
    let shown: String = text.chars().take(LONGEST_QUOTE).map(printable).collect();
    let rest = if shown.len() < text.len() { "…" } else { "" };
    format!("`{shown}{rest}`")
}

/// Why a value is refused, wherever it stands.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) message: String,
    pub(super) help: String,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }

    pub(super) fn at(self, span: &Span) -> Finding {
        Finding { message: self.message, help: self.help, span: Some(span.clone()), other: None }
    }
}

/// Something found in the text.
#[derive(Debug)]
pub(super) struct Finding {
    message: String,
    help: String,
    span: Option<Span>,
    /// A second place, and what is there.
    other: Option<(Span, &'static str)>,
}

impl Finding {
    pub(super) fn new(span: &Span, message: impl Into<String>, help: impl Into<String>) -> Self {
        Refusal::new(message, help).at(span)
    }

    /// About the text as a whole.
    pub(super) fn nowhere(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into(), span: None, other: None }
    }

    /// Points at a second place, too.
    pub(super) fn and(self, span: &Span, label: &'static str) -> Self {
        Self { other: Some((span.clone(), label)), ..self }
    }

    fn into_problem(self, severity: Severity, source: &Arc<Source>) -> Problem {
        let here = self.other.as_ref().map(|_| "here".to_owned());
        let primary = self.span.map(|span| (source.underline(&span), here));
        let other = self.other.map(|(span, label)| (source.underline(&span), Some(label.to_owned())));
        let label = |(span, text): (Span, Option<String>), primary: bool| {
            let at = (span.start, span.len());
            if primary { LabeledSpan::new_primary_with_span(text, at) } else { LabeledSpan::new_with_span(text, at) }
        };
        Problem {
            severity,
            message: self.message,
            help: self.help,
            labels: primary.map(|p| label(p, true)).into_iter().chain(other.map(|o| label(o, false))).collect(),
            source: Arc::clone(source),
        }
    }
}

/// Collects everything that is found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    errors: Vec<Finding>,
    omitted: usize,
    warnings: Vec<Finding>,
}

impl Findings {
    pub(super) fn error(&mut self, finding: Finding) {
        if self.errors.len() < MOST_FINDINGS {
            self.errors.push(finding);
        } else {
            self.omitted += 1;
        }
    }

    pub(super) fn warning(&mut self, finding: Finding) {
        if self.warnings.len() < MOST_FINDINGS {
            self.warnings.push(finding);
        }
    }

    /// Is nothing wrong so far?
    pub(super) fn is_good(&self) -> bool {
        self.errors.is_empty()
    }

    /// The value, or none and an error at the span.
    pub(super) fn accept<T>(&mut self, value: Result<T, Refusal>, span: &Span) -> Option<T> {
        value.map_err(|refusal| self.error(refusal.at(span))).ok()
    }

    /// The warnings, or all errors, in the order of the file.
    pub(super) fn finish(self, name: &str, bytes: &[u8]) -> Result<Vec<Problem>, ConfigError> {
        if self.errors.is_empty() {
            Ok(problems(self.warnings, Severity::Warning, name, bytes))
        } else {
            Err(self.fail(name, bytes))
        }
    }

    /// All errors, in the order of the file.
    pub(super) fn fail(self, name: &str, bytes: &[u8]) -> ConfigError {
        let problems = problems(self.errors, Severity::Error, name, bytes);
        ConfigError { problems, omitted: self.omitted }
    }
}

fn problems(mut findings: Vec<Finding>, severity: Severity, name: &str, bytes: &[u8]) -> Vec<Problem> {
    if findings.is_empty() {
        return Vec::new();
    }
    findings.sort_by_key(|finding| finding.span.as_ref().map(|span| span.start));
    let source = Arc::new(Source::new(name, bytes));
    findings.into_iter().map(|finding| finding.into_problem(severity, &source)).collect()
}

/// An error or a warning about one place in the configuration.
///
/// `Display` is the message alone; [`Problem::line`] is for logs and [`Problem::render`] for people.
#[derive(Clone, Debug)]
pub struct Problem {
    severity: Severity,
    message: String,
    help: String,
    /// The offending place first.
    labels: Vec<LabeledSpan>,
    source: Arc<Source>,
}

impl Problem {
    /// What is wrong.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to write instead.
    #[must_use]
    pub fn help(&self) -> &str {
        &self.help
    }

    /// Line and column of the offending text, both from 1, the column in characters; none if it is about the file.
    #[must_use]
    pub fn position(&self) -> Option<(usize, usize)> {
        self.labels.first().map(|label| self.source.position(label.offset()))
    }

    /// The texts that a report underlines, the offending one first: at most one line of each.
    pub fn underlined(&self) -> impl Iterator<Item = &str> {
        self.labels.iter().map(|label| self.source.get(label.offset()..label.offset() + label.len()))
    }

    /// One line, for logs: `file:line:column: message (help)`.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { message, help, source, .. } = self;
        match self.position() {
            Some((line, column)) => format!("{}:{line}:{column}: {message} ({help})", source.name()),
            None => format!("{}: {message} ({help})", source.name()),
        }
    }

    /// A report with an excerpt of the file, for a terminal.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let theme = if colour { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(80);
        let mut report = String::new();
        match handler.render_report(&mut report, self) {
            Ok(()) => report,
            Err(fmt::Error) => self.line() + "\n",
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.labels.is_empty() {
            // There is no excerpt that names the file.
            write!(f, "{}: ", self.source.name())?;
        }
        f.write_str(&self.message)
    }
}

/// As a program reads it.
impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (line, column) = self.position().unzip();
        let mut problem = serializer.serialize_struct("Problem", 5)?;
        problem.serialize_field("severity", if self.severity == Severity::Error { "error" } else { "warning" })?;
        problem.serialize_field("message", &self.message)?;
        problem.serialize_field("help", &self.help)?;
        problem.serialize_field("line", &line)?;
        problem.serialize_field("column", &column)?;
        problem.end()
    }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(&self.help))
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        Some(&*self.source)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        (!self.labels.is_empty()).then(|| Box::new(self.labels.iter().cloned()) as Box<dyn Iterator<Item = _>>)
    }
}

/// Why a configuration is refused: all that is wrong with it, in the order of the file.
///
/// `Display` writes one line for each error: `file:line:column: message (help)`.
#[derive(Clone, Debug)]
pub struct ConfigError {
    /// Never empty.
    problems: Vec<Problem>,
    omitted: usize,
}

impl ConfigError {
    /// The file could not be read as a whole.
    pub(super) fn unreadable(name: &str, message: impl Into<String>, help: impl Into<String>) -> Self {
        let source = Arc::new(Source::new(name, &[]));
        let problem = Finding::nowhere(message, help).into_problem(Severity::Error, &source);
        Self { problems: vec![problem], omitted: 0 }
    }

    /// The errors, at most 100 of them.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// How many errors there are beyond [`ConfigError::problems`].
    #[must_use]
    pub const fn omitted(&self) -> usize {
        self.omitted
    }

    /// A report with excerpts of the file, for a terminal.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let reports: Vec<String> = self.problems.iter().map(|problem| problem.render(colour)).collect();
        let mut report = reports.join("\n");
        if self.omitted > 0 {
            report.push_str(&format!("\n… and {} more errors\n", self.omitted));
        }
        report
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&problem.line())?;
        }
        if self.omitted > 0 {
            write!(f, "\n… and {} more errors", self.omitted)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl Diagnostic for ConfigError {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.problems.iter().map(|problem| problem as &dyn Diagnostic)))
    }
}
