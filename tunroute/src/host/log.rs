//! The daemon's log on standard error: for people, or for journald, which wants a priority before each line.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
};

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// `LOG_ERR` of syslog(3).
const ERROR: u8 = 3;

/// Begins to log. `RUST_LOG` chooses what, `info` unless it is set.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if to_journal() {
        log.event_format(Journal).init();
    } else {
        log.with_ansi(io::stderr().is_terminal()).with_target(false).init();
    }
}

/// Says that the program cannot go on, also before there is a log.
pub fn complain(text: &str) {
    let mut lines = String::new();
    if to_journal() {
        // Writing to a string does not fail.
        let _ = prefixed(&mut lines, ERROR, text);
    } else {
        lines = format!("{text}\n");
    }
    // Nobody is left to tell if standard error is closed.
    let _closed = io::stderr().write_all(lines.as_bytes());
}

/// Is standard error journald's? `JOURNAL_STREAM` alone may be inherited by somebody who has redirected it since.
fn to_journal() -> bool {
    let Some(stream) = std::env::var("JOURNAL_STREAM").ok() else { return false };
    fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The form that sd-daemon(3) describes: `<4>text`. journald adds the time and the name itself.
struct Journal;

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => ERROR,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        let mut text = String::new();
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        prefixed(&mut writer, priority, &text)
    }
}

/// Each line is an entry of its own to journald.
fn prefixed(writer: &mut impl fmt::Write, priority: u8, text: &str) -> fmt::Result {
    text.lines().try_for_each(|line| writeln!(writer, "<{priority}>{line}"))
}
