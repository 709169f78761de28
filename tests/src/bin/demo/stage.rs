//! Where scenes are shown: numbered, with a line for each expectation, at most 80 columns wide.

use std::{
    fmt::Display,
    fs,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

/// Columns of the words that say what is expected; what was seen stands to the right of them.
const LABEL: usize = 34;
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
    /// The last line was empty, or there was none.
    blank: bool,
    started: Instant,
}

impl Stage {
    /// An empty stage. It has colours on a terminal, unless `NO_COLOR` is set.
    pub fn new() -> Self {
        let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { colour, scene: 0, held: 0, failed: 0, failed_before: 0, log: None, blank: true, started: Instant::now() }
    }

    /// Where the daemon logs: its end is shown after a scene in which something failed.
    pub fn log_is(&mut self, path: PathBuf) {
        self.log = Some(path);
    }

    /// Words before the first scene.
    pub fn prologue(&mut self, title: &str, text: &str) {
        let title = self.ink(Ink::Bold, title);
        self.say(&title);
        self.explain(text);
    }

    /// Begins a scene.
    pub fn scene(&mut self, title: &str, explanation: &str) {
        self.end_scene();
        self.scene += 1;
        let title = self.ink(Ink::Bold, &format!("{}  {title}", self.scene));
        self.paragraph();
        self.say(&title);
        self.explain(explanation);
        self.paragraph();
    }

    fn end_scene(&mut self) {
        if self.failed > self.failed_before
            && let Some(log) = self.log.as_ref().and_then(|path| fs::read_to_string(path).ok())
            && !log.is_empty()
        {
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL)..];
            self.show("The end of the daemon's log:", &tail.join("\n"));
        }
        self.failed_before = self.failed;
    }

    /// Words of the narrator.
    pub fn explain(&mut self, text: &str) {
        for line in text.lines() {
            self.say(&format!("   {line}"));
        }
    }

    /// Text from elsewhere: a file, a log, a command's output.
    pub fn show(&mut self, heading: &str, text: &str) {
        self.paragraph();
        self.explain(heading);
        for line in text.lines() {
            let line = self.ink(Ink::Dim, &format!("    {line}"));
            self.say(&line);
        }
        self.paragraph();
    }

    /// Names the columns of what is seen in the expectations that follow.
    pub fn columns(&mut self, label: &str, columns: &str) {
        self.paragraph();
        let heading = self.ink(Ink::Dim, &format!("     {label:<LABEL$}{columns}"));
        self.say(&heading);
    }

    /// An empty line, unless there is one.
    pub fn paragraph(&mut self) {
        if !self.blank {
            self.say("");
        }
    }

    /// Expects that what was seen is what it should be, and shows it.
    pub fn expect<T: PartialEq + Display>(&mut self, what: &str, expected: &T, seen: &T) {
        self.expect_that(what, seen == expected, expected, seen);
    }

    /// Expects something that is not mere equality: `expected` says what.
    pub fn expect_that(&mut self, what: &str, holds: bool, expected: impl Display, seen: impl Display) {
        if holds {
            self.held += 1;
            let line = format!("   {} {what:<LABEL$}{seen}", self.ink(Ink::Green, "✔"));
            self.say(&line);
        } else {
            self.fail(what, &[("expected", &expected.to_string()), ("seen", &seen.to_string())]);
        }
    }

    fn fail(&mut self, what: &str, reasons: &[(&str, &str)]) {
        self.failed += 1;
        let line = format!("   {} {}", self.ink(Ink::Red, "✘"), self.ink(Ink::Bold, what));
        self.say(&line);
        for (name, text) in reasons {
            self.say(&format!("       {name:<10}{}", text.replace('\n', "\n                 ")));
        }
    }

    /// Expects that there is no line in a list of differences.
    pub fn expect_unchanged(&mut self, what: &str, differences: &str) {
        let seen = if differences.is_empty() { "as before" } else { differences.trim_end() };
        self.expect_that(what, differences.is_empty(), "as before", seen);
    }

    /// The play cannot go on.
    pub fn broke_off(&mut self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        // An error of the daemon ends with all of its log; the last lines come next, and are enough.
        let reason = text.split("log:\n").next().unwrap_or_default();
        let reason =
            reason.trim_end_matches("its ").trim_end_matches("the daemon's ").trim_end_matches([';', ' ', '\n']);
        self.fail("the demo cannot go on", &[("because", reason)]);
        self.end_scene();
    }

    /// The last words, and the exit status.
    pub fn finish(mut self) -> ExitCode {
        self.end_scene();
        let Self { held, failed, .. } = self;
        let took = self.started.elapsed().as_secs_f32();
        self.paragraph();
        if failed == 0 && held > 0 {
            let verdict = self.ink(Ink::Green, &format!("✔ All {held} expectations held"));
            self.say(&format!("{verdict}, in {took:.1} s."));
            self.say("  To route on this host: cargo xtask run -- --config FILE");
            ExitCode::SUCCESS
        } else {
            let verdict = self.ink(Ink::Red, &format!("✘ {failed} of {} expectations failed", held + failed));
            self.say(&format!("{verdict}, in {took:.1} s."));
            ExitCode::FAILURE
        }
    }

    /// A line. A closed output does not end the play before its exit status.
    fn say(&mut self, line: &str) {
        let line = line.trim_end();
        self.blank = line.is_empty();
        let _ = writeln!(io::stdout(), "{line}");
    }

    fn ink(&self, ink: Ink, text: &str) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", ink as u8) } else { text.to_owned() }
    }
}
