//! `tunroute top`: a full-screen view of the running daemon.
//!
//! It asks for the status at intervals, as `status --watch` does. [`model`] turns the answers into rates and events, and
//! [`mod@draw`] draws them.

mod draw;
pub mod events;
pub mod model;
#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use crossterm::event::{Event, EventStream, KeyCode, KeyEventKind, KeyModifiers};
use futures::{StreamExt as _, future::select_all};
use ratatui::DefaultTerminal;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};

pub use self::draw::{Paint, draw};
use self::model::Model;
use crate::{
    control::socket::{Answer, OTHER_ANSWER, Request, ask},
    control::status::Status,
};

/// How long an answer may take: a daemon that loads a million prefixes is busy for seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// The terminal in full-screen mode. Dropping it restores the terminal, also after a panic.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> anyhow::Result<Self> {
        ratatui::try_init().map(Self).context("cannot draw on this terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Shows the view until a key or a signal ends it.
///
/// # Errors
///
/// There is no terminal, no daemon answers at the start, or the terminal fails.
pub async fn top(runtime_dir: PathBuf, interval: Duration, paint: Paint) -> anyhow::Result<()> {
    ensure!(
        io::stdout().is_terminal(),
        "`top` needs a terminal: use `tunroute status --watch` to print to a file or a pipe"
    );
    let mut model = Model::new(look(&runtime_dir).await?);
    let mut last = Instant::now();
    let mut ended = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()]
        .into_iter()
        .map(signal)
        .collect::<io::Result<Vec<_>>>()
        .context("cannot wait for signals")?;
    let mut ended = select_all(ended.iter_mut().map(|signal| Box::pin(signal.recv())));
    let (answers, mut answered) = mpsc::channel(1);
    // A task of its own, so that keys work while the daemon is slow to answer.
    tokio::spawn(async move {
        loop {
            sleep(interval).await;
            if answers.send(look(&runtime_dir).await).await.is_err() {
                return;
            }
        }
    });
    let mut screen = Screen::open()?;
    let mut events = EventStream::new();
    loop {
        screen.0.draw(|frame| draw(frame, &model, paint)).context("cannot draw on this terminal")?;
        tokio::select! {
            event = events.next() => match event {
                // A change of the terminal's size is an event, too, and draws the screen again.
                Some(event) => if quits(&event.context("cannot read from this terminal")?) { return Ok(()) },
                None => return Ok(()),
            },
            Some(answer) = answered.recv() => {
                let after = last.elapsed();
                last = Instant::now();
                match answer {
                    Ok(status) => model.answer(status, after),
                    Err(why) => model.no_answer(format!("{why:#}"), after),
                }
            }
            _ = &mut ended => return Ok(()),
        }
    }
}

/// The daemon's status.
async fn look(runtime_dir: &Path) -> anyhow::Result<Status> {
    let answer = timeout(PATIENCE, ask(runtime_dir, Request::Status)).await;
    match answer.with_context(|| format!("the daemon has not answered in {} s", PATIENCE.as_secs()))?? {
        Answer::Status(status) => Ok(*status),
        Answer::Failed(why) => bail!("{why}"),
        _ => bail!("{OTHER_ANSWER}"),
    }
}

fn quits(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && (matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || (control && key.code == KeyCode::Char('c')))
}
