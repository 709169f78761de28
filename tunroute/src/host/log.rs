//! The daemon's log on standard error: for people, or for journald, which wants a priority before each line.

use std::{
    env, fmt,
    io::{self, IsTerminal as _, Write as _},
};

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    Layer as _,
    filter::Targets,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

/// `LOG_ERR` of syslog(3).
const ERROR: u8 = 3;

/// Starts logging. `RUST_LOG` sets the level, such as `debug` or `tunroute=debug,aya=info`; the default is `info`.
pub fn init() {
    let chosen = env::var("RUST_LOG").ok().and_then(|levels| levels.parse().ok());
    let levels = chosen.unwrap_or_else(|| Targets::new().with_default(Level::INFO));
    let log = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let log = if to_journal() {
        log.event_format(Journal).boxed()
    } else {
        log.with_ansi(io::stderr().is_terminal()).with_target(false).boxed()
    };
    tracing_subscriber::registry().with(log).with(levels).init();
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
    // A closed standard error leaves no place to report to.
    let _closed = io::stderr().write_all(lines.as_bytes());
}

/// Returns true if standard error is journald's. `JOURNAL_STREAM` alone may be inherited and redirected since.
fn to_journal() -> bool {
    let Some(stream) = env::var("JOURNAL_STREAM").ok() else { return false };
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
