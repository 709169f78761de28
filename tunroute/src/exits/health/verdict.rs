//! Turns single answers into a verdict: pure, over results and times.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::config::Probe;

/// The probes over which loss and delay are reckoned.
const WINDOW: usize = 100;

/// What one probe has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer, after this time.
    Answer(Duration),
    /// No answer, and why.
    Lost(String),
    /// The device does not exist.
    NoDevice,
    /// The probe could not be sent for a reason that says nothing about the tunnel (no permission, no descriptors).
    Unable(String),
}

/// What is held of a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Not enough was seen yet; counts as up.
    #[default]
    Unknown,
    /// It answers.
    Up,
    /// It does not.
    Down,
}

impl Verdict {
    /// The name in `status --json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// The state of one probe.
///
/// It begins [`Verdict::Unknown`], which counts as up: traffic does not wait for a probe when the machine boots or the
/// daemon restarts, and a tunnel that works loses nothing. The first answer makes it up. `fail` losses in a row make it
/// down; without a verdict they come as fast as the timeout allows ([`Health::next`]), so that a dead tunnel is believed
/// in for no longer than needed. A device that has not appeared yet is no reason to leave Unknown, for it then works
/// the moment it appears; one that vanishes later counts as lost like any other.
///
/// From down, `rise` answers in a row make it up again, but not before `hold_down` is over.
#[derive(Clone, Debug)]
pub struct Health {
    fail: u32,
    rise: u32,
    hold_down: Duration,
    verdict: Verdict,
    /// Results in a row that speak against the verdict.
    against: u32,
    down_since: Option<Instant>,
    /// The last [`WINDOW`] results, oldest first.
    window: VecDeque<Option<Duration>>,
}

impl Health {
    /// The state of a probe that was never sent.
    #[must_use]
    pub fn new(probe: &Probe) -> Self {
        Self {
            fail: probe.fail,
            rise: probe.rise,
            hold_down: probe.hold_down,
            verdict: Verdict::Unknown,
            against: 0,
            down_since: None,
            window: VecDeque::new(),
        }
    }

    /// The same state under changed settings of the probe.
    #[must_use]
    pub fn with_settings(self, probe: &Probe) -> Self {
        Self { fail: probe.fail, rise: probe.rise, hold_down: probe.hold_down, ..self }
    }

    /// What is held of the tunnel.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes the outcome of one probe.
    pub fn observe(&mut self, now: Instant, outcome: &Outcome) {
        let answer = match outcome {
            Outcome::Unable(_) => return,
            Outcome::Answer(delay) => Some(*delay),
            Outcome::Lost(_) | Outcome::NoDevice => None,
        };
        if self.window.len() >= WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(answer);

        match (self.verdict, answer) {
            (Verdict::Unknown, Some(_)) => {
                self.verdict = Verdict::Up;
                self.against = 0;
            }
            (Verdict::Unknown, None) if *outcome == Outcome::NoDevice => self.against = 0,
            (Verdict::Up, Some(_)) | (Verdict::Down, None) => self.against = 0,
            (Verdict::Unknown | Verdict::Up, None) => {
                self.against = self.against.saturating_add(1);
                if self.against >= self.fail {
                    self.verdict = Verdict::Down;
                    self.against = 0;
                    self.down_since = Some(now);
                }
            }
            (Verdict::Down, Some(_)) => {
                self.against = self.against.saturating_add(1);
                let held = self.down_since.is_some_and(|since| now.saturating_duration_since(since) < self.hold_down);
                if self.against >= self.rise && !held {
                    self.verdict = Verdict::Up;
                    self.against = 0;
                    self.down_since = None;
                }
            }
        }
    }

    /// The time from the beginning of one probe to that of the next.
    #[must_use]
    pub fn next(&self, probe: &Probe, outcome: &Outcome) -> Duration {
        match (self.verdict, outcome) {
            (Verdict::Unknown, Outcome::Lost(_)) => probe.timeout.min(probe.interval),
            _ => probe.interval,
        }
    }

    /// The share of the last probes that were lost, in percent; none before the first.
    #[must_use]
    pub fn loss_percent(&self) -> Option<f32> {
        let (sent, lost) = (self.window.len(), self.window.iter().filter(|answer| answer.is_none()).count());
        // At most WINDOW, so exact.
        let exact = |count: usize| u16::try_from(count).map(f32::from).ok();
        Some(100.0 * exact(lost)? / exact(sent).filter(|sent| *sent > 0.0)?)
    }

    /// The mean delay of the answers among the last probes.
    #[must_use]
    pub fn mean_delay(&self) -> Option<Duration> {
        let answers = u32::try_from(self.window.iter().flatten().count()).ok()?;
        self.window.iter().flatten().sum::<Duration>().checked_div(answers)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{config::ProbeTarget, exits::health::verdict::Verdict::*};

    fn probe(fail: u32, rise: u32, hold_down: u64) -> Probe {
        Probe {
            target: ProbeTarget::Echo("2001:db8::1".parse().unwrap()),
            source: None,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            fail,
            rise,
            hold_down: Duration::from_secs(hold_down),
        }
    }

    fn outcome(letter: char) -> Outcome {
        match letter {
            '+' => Outcome::Answer(Duration::from_millis(10)),
            '-' => Outcome::Lost("lost".to_owned()),
            'x' => Outcome::NoDevice,
            _ => Outcome::Unable("no permission".to_owned()),
        }
    }

    /// One outcome a second; the verdicts after each.
    fn verdicts(probe: &Probe, outcomes: &str) -> String {
        let start = Instant::now();
        let mut health = Health::new(probe);
        let mut verdicts = String::new();
        for (second, letter) in outcomes.chars().enumerate() {
            health.observe(start + Duration::from_secs(second as u64), &outcome(letter));
            verdicts.push(match health.verdict() {
                Unknown => '?',
                Up => 'u',
                Down => 'd',
            });
        }
        verdicts
    }

    #[test]
    fn verdicts_follow_outcomes() {
        let cases = [
            // fail, rise, hold-down in seconds, outcomes, verdicts
            (3, 2, 0, "+---++", "uuuddu"),
            (3, 2, 0, "---", "??d"),
            (3, 2, 0, "--+", "??u"),
            (3, 2, 0, "+--+--+---", "uuuuuuuuud"),
            (3, 2, 0, "---+-+-++", "??ddddddu"),
            (1, 1, 0, "-+-+", "dudu"),
            // A device that is not there yet, and one that goes.
            (3, 2, 0, "xxxxx+", "?????u"),
            (3, 2, 0, "xx--xx---", "????????d"),
            (3, 2, 0, "+xxx++", "uuuddu"),
            (3, 2, 0, "+-x-", "uuud"),
            // What says nothing changes nothing.
            (2, 2, 0, "!!!-!-!+!+", "?????ddddu"),
            // Held down for 5 s from the verdict on; the answers in the meantime count.
            (1, 2, 5, "-++++++", "ddddduu"),
            (1, 2, 5, "-++++-+++", "ddddddduu"),
        ];
        for (fail, rise, hold_down, outcomes, expected) in cases {
            let probe = probe(fail, rise, hold_down);
            assert_eq!(verdicts(&probe, outcomes), expected, "fail {fail} rise {rise} hold {hold_down}: {outcomes}");
        }
    }

    #[test]
    fn without_a_verdict_losses_follow_fast() {
        let probe = probe(2, 1, 0);
        let mut health = Health::new(&probe);
        let pauses = ['x', '-', '-', '-', '+'].map(|letter| {
            health.observe(Instant::now(), &outcome(letter));
            health.next(&probe, &outcome(letter)).as_secs()
        });
        assert_eq!(pauses, [5, 1, 5, 5, 5]);
    }

    #[test]
    fn settings_change_and_the_verdict_stays() {
        let mut health = Health::new(&probe(1, 5, 1000));
        health.observe(Instant::now(), &outcome('-'));
        let mut health = health.with_settings(&probe(1, 1, 0));
        assert_eq!(health.verdict(), Down);
        health.observe(Instant::now(), &outcome('+'));
        assert_eq!(health.verdict(), Up);
    }

    #[test]
    fn loss_and_delay_are_of_the_last_probes() {
        let mut health = Health::new(&probe(1, 1, 0));
        assert_eq!((health.loss_percent(), health.mean_delay()), (None, None));
        for letter in "-+-+!".chars() {
            health.observe(Instant::now(), &outcome(letter));
        }
        assert_eq!((health.loss_percent(), health.mean_delay()), (Some(50.0), Some(Duration::from_millis(10))));
        for _ in 0..WINDOW {
            health.observe(Instant::now(), &outcome('-'));
        }
        assert_eq!((health.loss_percent(), health.mean_delay()), (Some(100.0), None));
    }

    proptest! {
        /// Against a second reading of the rules, from the whole history.
        #[test]
        fn transitions_need_their_reasons(
            fail in 1..4u32,
            rise in 1..4u32,
            hold in 0..8u64,
            outcomes in "[+\\-x!]{0,60}",
        ) {
            let history = verdicts(&probe(fail, rise, hold), &outcomes);
            let mut down_at = 0;
            for index in 0..outcomes.len() {
                let before = index.checked_sub(1).map_or("?", |before| &history[before..index]);
                let now = &history[index..=index];
                let told: Vec<char> = outcomes[..=index].chars().filter(|letter| *letter != '!').collect();
                let in_a_row = |letters: &str| told.iter().rev().take_while(|letter| letters.contains(**letter)).count();
                match (before, now) {
                    ("u" | "?", "d") => {
                        prop_assert!(in_a_row("-x") >= fail as usize);
                        down_at = index as u64;
                    }
                    ("d", "u") => {
                        prop_assert!(in_a_row("+") >= rise as usize);
                        prop_assert!(index as u64 - down_at >= hold);
                    }
                    ("u", "u") => prop_assert!(in_a_row("-x") < fail as usize),
                    ("?", "?") => prop_assert!(in_a_row("-") < fail as usize && in_a_row("+") == 0),
                    ("d", "d") => prop_assert!(in_a_row("+") < rise as usize || index as u64 - down_at < hold || outcomes[index..=index] == *"!"),
                    ("?", "u") => prop_assert_eq!(in_a_row("+"), 1),
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }
    }
}
