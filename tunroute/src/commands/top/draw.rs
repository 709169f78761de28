//! Draws the model on the terminal.

use std::{cmp::Reverse, time::Duration};

use ratatui::{
    Frame,
    layout::{Constraint, Rect},
    style::{Color, Style, Stylize as _},
    text::{Line, Text},
    widgets::{Cell, Row, Table},
};

use super::model::{Model, OutcomeRow, PolicyRow, Subject, TunnelRow};
use crate::{
    control::status::bytes,
    exits::health::{self, Verdict},
};

/// The narrowest and the widest column of names.
const NAME: (usize, usize) = (6, 20);
/// The smallest useful section: an empty line, headings and one row.
const LEAST: u16 = 3;
/// The number of blanks between two columns.
const SPACING: u16 = 1;

/// How the screen is coloured.
#[derive(Clone, Copy, Debug)]
pub struct Paint {
    /// Whether colours are used.
    pub colour: bool,
}

impl Paint {
    fn colour(self, colour: Color) -> Style {
        if self.colour { Style::new().fg(colour) } else { Style::new() }
    }

    /// The style of a state: green for good, red for bad.
    fn state(self, state: &str) -> Cell<'static> {
        let style = match state {
            "up" | "on" => self.colour(Color::Green),
            "down" | "failed" | "unable" | "off" => self.colour(Color::Red),
            _ => self.colour(Color::Yellow),
        };
        Cell::new(Text::styled(state.to_owned(), style))
    }
}

/// Draws the whole screen.
pub fn draw(frame: &mut Frame<'_>, model: &Model, paint: Paint) {
    let area = frame.area();
    let head = Rect { height: area.height.min(1), ..area };
    frame.render_widget(heading(model, paint), head);
    let sections = [
        tunnels(model, paint, area.width),
        policies(model, area.width),
        outcomes(model),
        probes(model, paint),
        events(model),
    ];
    let heights = share(area.height.saturating_sub(head.height), sections.each_ref().map(Section::height));
    let mut y = area.y + head.height;
    for (section, height) in sections.into_iter().zip(heights).filter(|(_, height)| *height > 0) {
        section.draw(frame, Rect { y: y + 1, height: height - 1, ..area }, paint);
        y += height;
    }
}

/// Shares the lines of the screen among sections, given the lines that each wants. First each section gets [`LEAST`] lines
/// in this order, or none; then all grow evenly up to what they want.
fn share<const N: usize>(mut lines: u16, wanted: [u16; N]) -> [u16; N] {
    let mut given = [0; N];
    for (given, wanted) in given.iter_mut().zip(wanted) {
        let least = wanted.min(LEAST);
        if least <= lines {
            *given = least;
            lines -= least;
        }
    }
    loop {
        let before = lines;
        for (given, wanted) in given.iter_mut().zip(wanted) {
            if (1..wanted).contains(given) && lines > 0 {
                *given += 1;
                lines -= 1;
            }
        }
        if lines == before {
            return given;
        }
    }
}

fn heading(model: &Model, paint: Paint) -> Line<'static> {
    let status = model.status();
    let uptime = humantime::format_duration(Duration::from_secs(status.uptime));
    let text = format!(
        "tunroute {}, pid {}, up {uptime}, datapath {}, fast path {}",
        status.version,
        status.pid,
        status.datapath.name(),
        status.fast_path.state
    );
    match model.silence() {
        None => Line::from(text).bold(),
        Some(silence) => {
            let text = format!("no answer for {} s: this is the last state known. {text}", silence.as_secs());
            Line::styled(text, paint.colour(Color::Red)).bold()
        }
    }
}

/// A table on the screen. If not all rows have room, those with the greatest weight are shown.
struct Section {
    headings: Vec<Line<'static>>,
    /// The widths of all columns but the last, which takes the rest.
    widths: Vec<u16>,
    rows: Vec<(u64, Row<'static>)>,
}

impl Section {
    /// The number of lines, with an empty one before the headings.
    fn height(&self) -> u16 {
        if self.rows.is_empty() { 0 } else { u16::try_from(self.rows.len() + 2).unwrap_or(u16::MAX) }
    }

    fn draw(mut self, frame: &mut Frame<'_>, area: Rect, paint: Paint) {
        let room = usize::from(area.height.saturating_sub(1));
        if self.rows.len() > room {
            self.rows.sort_by_key(|(weight, _)| Reverse(*weight));
            if let Some(last) = self.headings.last_mut() {
                last.push_span(format!(" ({} more)", self.rows.len() - room));
            }
        }
        let widths = self.widths.into_iter().map(Constraint::Length).chain([Constraint::Fill(1)]);
        let headings = Row::new(self.headings).style(paint.colour(Color::Cyan)).bold();
        let table = Table::new(self.rows.into_iter().take(room).map(|(_, row)| row), widths);
        frame.render_widget(table.header(headings).column_spacing(SPACING), area);
    }
}

fn right(text: impl Into<String>) -> Line<'static> {
    Line::from(text.into()).right_aligned()
}

/// The width of a column of names: that of the longest, within [`NAME`].
fn name_width<'a>(names: impl Iterator<Item = &'a str>) -> u16 {
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0);
    u16::try_from(longest.clamp(NAME.0, NAME.1)).unwrap_or(0)
}

/// The width left for the last column.
fn rest(widths: &[u16], width: u16) -> usize {
    usize::from(widths.iter().fold(width, |left, column| left.saturating_sub(column + SPACING)))
}

fn tunnels(model: &Model, paint: Paint, width: u16) -> Section {
    let rows = &model.rows().tunnels;
    let name = name_width(rows.iter().map(|row| row.name.as_str()));
    let widths = vec![name, 7, 9, 12, 9, 12];
    let spark = rest(&widths, width);
    let row = |row: &TunnelRow| {
        let cells = [
            Cell::new(row.name.clone()),
            paint.state(&row.state),
            Cell::new(right(row.sent.packets.to_string())),
            Cell::new(right(format!("{}/s", bytes(row.sent.bytes)))),
            Cell::new(right(row.received.packets.to_string())),
            Cell::new(right(format!("{}/s", bytes(row.received.bytes)))),
            Cell::new(model.sparkline(&Subject::Tunnel(row.name.clone()), spark)),
        ];
        (row.sent.bytes.saturating_add(row.received.bytes), Row::new(cells))
    };
    Section {
        headings: vec![
            "TUNNEL".into(),
            "STATE".into(),
            right("PACKETS/s"),
            right("SENT"),
            right("PACKETS/s"),
            right("RECEIVED"),
            right("BYTES/s"),
        ],
        rows: rows.iter().map(row).collect(),
        widths,
    }
}

fn policies(model: &Model, width: u16) -> Section {
    let rows = &model.rows().policies;
    let name = name_width(rows.iter().map(|row| row.name.as_str()));
    let leaves_by = name_width(rows.iter().map(|row| row.leaves_by.as_str()).chain(["LEAVES BY"]));
    let widths = vec![name, leaves_by, 10, 9, 12];
    let spark = rest(&widths, width);
    let row = |row: &PolicyRow| {
        let cells = [
            Cell::new(row.name.clone()),
            Cell::new(row.leaves_by.clone()),
            Cell::new(row.decided_by.clone()),
            Cell::new(right(row.rate.packets.to_string())),
            Cell::new(right(format!("{}/s", bytes(row.rate.bytes)))),
            Cell::new(model.sparkline(&Subject::Policy(row.name.clone()), spark)),
        ];
        (row.rate.bytes, Row::new(cells))
    };
    Section {
        headings: vec![
            "POLICY".into(),
            "LEAVES BY".into(),
            "DECIDED BY".into(),
            right("PACKETS/s"),
            right("FAST PATH"),
            right("BYTES/s"),
        ],
        rows: rows.iter().map(row).collect(),
        widths,
    }
}

fn outcomes(model: &Model) -> Section {
    let rows = &model.rows().outcomes;
    let name = name_width(rows.iter().map(|row| row.policy.as_str()));
    let row = |row: &OutcomeRow| {
        let cells = [
            Cell::new(row.policy.clone()),
            Cell::new(right(row.rate.packets.to_string())),
            Cell::new(right(row.total.to_string())),
            Cell::new(row.what),
        ];
        (row.rate.packets, Row::new(cells))
    };
    Section {
        headings: vec!["POLICY".into(), right("PACKETS/s"), right("PACKETS"), "NOT SENT INTO ITS TUNNEL".into()],
        widths: vec![name, 9, 12],
        rows: rows.iter().map(row).collect(),
    }
}

fn probes(model: &Model, paint: Paint) -> Section {
    let probes: Vec<_> = model.status().tunnels.iter().flat_map(|tunnel| &tunnel.probes).collect();
    let name = name_width(probes.iter().map(|probe| probe.tunnel.as_str()));
    let target = name_width(probes.iter().map(|probe| probe.target.as_str()));
    let row = |probe: &&health::Status| {
        let delay = probe.mean_delay_us.map_or_else(|| "-".to_owned(), milliseconds);
        let loss = probe.loss_percent.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.1} %"));
        let error = probe.last_error.clone().unwrap_or_default();
        let cells = [
            Cell::new(probe.tunnel.clone()),
            Cell::new(probe.target.clone()),
            paint.state(probe.verdict.name()),
            Cell::new(right(delay)),
            Cell::new(right(loss)),
            Cell::new(error),
        ];
        (u64::from(probe.verdict == Verdict::Down), Row::new(cells))
    };
    Section {
        headings: vec![
            "TUNNEL".into(),
            "PROBE".into(),
            "STATE".into(),
            right("DELAY"),
            right("LOSS"),
            "LAST ERROR".into(),
        ],
        widths: vec![name, target, 7, 11, 7],
        rows: probes.iter().map(row).collect(),
    }
}

fn milliseconds(microseconds: u64) -> String {
    format!("{}.{:03} ms", microseconds / 1000, microseconds % 1000)
}

/// The events, the newest first.
fn events(model: &Model) -> Section {
    let mut rows: Vec<(u64, Row<'static>)> = model
        .events()
        .map(|(age, what)| (0, Row::new([right(format!("{} s", age.as_secs())), Line::from(what.to_owned())])))
        .collect();
    if rows.is_empty() {
        rows.push((0, Row::new(["", "nothing has changed yet; press q to quit"])));
    }
    Section { headings: vec![right("AGO"), "EVENT".into()], widths: vec![8], rows }
}
