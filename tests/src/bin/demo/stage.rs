//! Where scenes are shown: numbered, with a line for each expectation, at most 80 columns wide.

use std::{
    fmt::{self, Display},
    fs,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

/// Columns of the words that say what is expected; what was seen stands to the right of them.
const LABEL: usize = 40;
/// Lines of the daemon's log that are shown after a failure.
const LOG_TAIL: usize = 20;

/// Ways to write, as SGR parameters of ECMA-48.
#[derive(Clone, Copy)]
enum Ink {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
}

/// Shows scenes, and keeps count of the expectations that held.
pub struct Stage {
    colour: bool,
    scene: u32,
    held: u32,
    failed: u32,
    /// How many had failed when the scene began.
    failed_before: u32,
    log: Option<PathBuf>,
    started: Instant,
}

impl Stage {
    /// An empty stage. It has colours on a terminal, unless `NO_COLOR` is set.
    pub fn new() -> Self {
        let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { colour, scene: 0, held: 0, failed: 0, failed_before: 0, log: None, started: Instant::now() }
    }

    /// Where the daemon logs: its end is shown after a scene in which something failed.
    pub fn log_is(&mut self, path: PathBuf) {
        self.log = Some(path);
    }

    /// Begins a scene.
    pub fn scene(&mut self, title: &str, explanation: &str) {
        self.end_scene();
        self.scene += 1;
        say(format_args!("\n{}", self.ink(Ink::Bold, &format!("{}  {title}", self.scene))));
        self.explain(explanation);
        say(format_args!(""));
    }

    fn end_scene(&mut self) {
        if self.failed > self.failed_before
            && let Some(log) = self.log.as_ref().and_then(|path| fs::read_to_string(path).ok())
        {
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL)..];
            self.show("The end of the daemon's log:", &tail.join("\n"));
        }
        self.failed_before = self.failed;
    }

    /// Words of the narrator.
    pub fn explain(&self, text: &str) {
        for line in text.lines() {
            say(format_args!("   {line}"));
        }
    }

    /// A text of somebody else: a file, a log, a command's output.
    pub fn show(&self, heading: &str, text: &str) {
        say(format_args!("   {heading}"));
        for line in text.lines() {
            say(format_args!("{}", self.ink(Ink::Dim, format!("     {line}").trim_end())));
        }
        say(format_args!(""));
    }

    /// Names the columns of what is seen in the expectations that follow.
    pub fn columns(&self, label: &str, columns: impl Display) {
        say(format_args!("{}", self.ink(Ink::Dim, &format!("     {label:<LABEL$}{columns}"))));
    }

    /// Expects that what was seen is what it should be, and shows it; returns whether it is.
    pub fn expect<T: PartialEq + Display>(&mut self, what: &str, expected: &T, seen: &T) -> bool {
        self.expect_that(what, seen == expected, expected, seen)
    }

    /// Expects something that is not mere equality: `expected` says what.
    pub fn expect_that(&mut self, what: &str, holds: bool, expected: impl Display, seen: impl Display) -> bool {
        if holds {
            self.held += 1;
            say(format_args!("   {} {what:<LABEL$}{seen}", self.ink(Ink::Green, "✔")));
        } else {
            self.failed += 1;
            say(format_args!("   {} {}", self.ink(Ink::Red, "✘"), self.ink(Ink::Bold, what)));
            say(format_args!("       expected  {}", indented(&expected)));
            say(format_args!("       seen      {}", indented(&seen)));
        }
        holds
    }

    /// The play cannot go on.
    pub fn broke_off(&mut self, error: &anyhow::Error) {
        self.expect_that("the scene could be played to its end", false, "yes", format!("{error:#}"));
        self.end_scene();
    }

    /// The last words, and the exit status.
    pub fn finish(mut self) -> ExitCode {
        self.end_scene();
        let Self { held, failed, .. } = self;
        let took = self.started.elapsed().as_secs_f32();
        if failed == 0 && held > 0 {
            let verdict = self.ink(Ink::Green, &format!("✔ All {held} expectations held"));
            say(format_args!("\n{verdict}, in {took:.1} s."));
            say(format_args!("  On this host: cargo xtask run -- --config FILE"));
            ExitCode::SUCCESS
        } else {
            let verdict = self.ink(Ink::Red, &format!("✘ {failed} of {} expectations failed", held + failed));
            say(format_args!("\n{verdict}, in {took:.1} s."));
            ExitCode::FAILURE
        }
    }

    fn ink(&self, ink: Ink, text: &str) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", ink as u8) } else { text.to_owned() }
    }
}

/// Differences between what was and what is: a line each.
#[derive(PartialEq)]
pub struct Lines(String);

impl Lines {
    /// From a text in which each line is a difference.
    pub fn changed(text: &str) -> Self {
        Self(text.trim_end().to_owned())
    }
}

impl Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "as before" } else { &self.0 })
    }
}

fn indented(text: &impl Display) -> String {
    text.to_string().replace('\n', "\n                 ")
}

/// A line. If nobody reads any more, the play goes on to its exit status all the same.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}
