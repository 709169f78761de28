//! The sites of all contestants that take part in a case, and rounds among them.

use std::{
    panic::resume_unwind,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{Bench, SENDER_CPU};
use crate::{
    contestant::{BASELINE, Contestant, Delivery, Installed, Task, TooSlow},
    generator::{Arrivals, BATCH, Entry, Frame, Generator, Sent, pin_to},
    load::flows,
    machine::kernel_memory,
    record::{Case, Measurement, Outcome, Unit},
    rounds::interleave,
    site::Site,
};

/// The generator alone.
pub const GENERATOR: &str = "generator";

/// Maximum time that packets are under way while other processes need the CPU, in milliseconds.
const UNDER_WAY: u32 = 1000;

/// A contestant in its place.
pub struct Place<'a> {
    /// Who.
    pub contestant: &'a dyn Contestant,
    /// Its processes. Dropped before the site.
    pub installed: Box<dyn Installed>,
    /// Its place.
    pub site: Site,
    /// How long it took to install.
    pub took: Duration,
    /// How many bytes of the kernel's memory came into use meanwhile.
    pub kernel_memory: f64,
    entry: Entry,
}

/// The contestants of a task.
pub struct Arena<'a> {
    /// Those that take part.
    pub places: Vec<Place<'a>>,
    /// Those that do not, and why.
    pub absent: Vec<(&'static str, Outcome)>,
}

impl<'a> Arena<'a> {
    /// Puts up everybody who can do it. `stop` says who is not asked, and why; `told` hears who begins.
    ///
    /// # Errors
    /// A site cannot be made. A contestant that cannot be installed is disqualified.
    pub fn new(
        generator: &Generator,
        contestants: &'a [Box<dyn Contestant>],
        task: &Task,
        stop: impl Fn(&dyn Contestant) -> Option<String>,
        told: impl Fn(&str),
    ) -> Result<Self> {
        let mut arena = Self { places: Vec::new(), absent: Vec::new() };
        for contestant in contestants {
            let contestant = contestant.as_ref();
            if let Some(why) = contestant.declines(task) {
                arena.absent.push((contestant.name(), Outcome::Declined(why.to_owned())));
                continue;
            }
            if let Some(why) = stop(contestant) {
                arena.absent.push((contestant.name(), Outcome::Stopped(why)));
                continue;
            }
            let site = Site::new(generator, task.target)?;
            let entry = site.entry()?;
            told(contestant.name());
            contestant.prepare(&site, task, 0)?;
            let before = kernel_memory();
            let start = Instant::now();
            match contestant.install(&site, task) {
                Ok(installed) => {
                    let (took, kernel_memory) = (start.elapsed(), kernel_memory() - before);
                    arena.places.push(Place { contestant, installed, site, took, kernel_memory, entry });
                }
                Err(error) => arena.absent.push((
                    contestant.name(),
                    match error.downcast_ref::<TooSlow>() {
                        Some(TooSlow(patience)) => {
                            Outcome::Stopped(format!("stopped: it was not installed within {patience:.0?}"))
                        }
                        None => Outcome::Disqualified(format!("not installed: {error:#}")),
                    },
                )),
            }
        }
        Ok(arena)
    }

    /// The place of the baseline.
    ///
    /// # Errors
    /// It does not take part, so there would be no ratios.
    pub fn baseline(&self) -> Result<usize> {
        let position = self.places.iter().position(|place| place.contestant.name() == BASELINE);
        let why = || self.absent.iter().find(|(name, _)| *name == BASELINE).map(|(_, why)| format!("{why:?}"));
        position.with_context(|| format!("the baseline must take part: {}", why().unwrap_or_default()))
    }

    /// The measurements of those that do not take part.
    #[must_use]
    pub fn not_there(&self, case: Case, unit: Unit) -> Vec<Measurement> {
        self.absent.iter().map(|(name, why)| Measurement::none(case, name, unit, why.clone())).collect()
    }
}

impl Place<'_> {
    /// Sends some packets; says how long each took, or what became of those that did not come out where they must.
    ///
    /// # Errors
    /// They cannot be sent.
    pub fn slice(&self, generator: &Generator, frame: Frame, packets: u32, cpus: u8) -> Result<Result<Sent, String>> {
        let before = generator.arrivals()?;
        let send = |cpu| {
            self.site.at_entry(|| {
                pin_to(SENDER_CPU + usize::from(cpu))?;
                let warm_up = generator.send(frame, self.entry, packets / 8)?;
                Ok((warm_up, generator.send(frame, self.entry, packets)?))
            })
        };
        let (mut packets, mut all) = (0, Sent::default());
        let slices: Vec<Result<(Sent, Sent)>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..cpus).map(|cpu| scope.spawn(move || send(cpu))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        for slice in slices {
            let (warm_up, sent) = slice?;
            packets += warm_up.packets + sent.packets;
            all = Sent { packets: all.packets + sent.packets, time: all.time.max(sent.time) };
        }
        // What went out on a wire may still be under way.
        let mut judged = judge(self.contestant.delivery(), packets, &before, &generator.arrivals()?);
        for _ in 0..UNDER_WAY {
            if judged.is_ok() || matches!(self.entry, Entry::Received(_)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
            judged = judge(self.contestant.delivery(), packets, &before, &generator.arrivals()?);
        }
        Ok(judged.map(|()| all))
    }

    /// The generator alone, in this place.
    ///
    /// # Errors
    /// The packets cannot be sent.
    pub fn generator_alone(&self, generator: &Generator, frame: Frame, packets: u32) -> Result<Sent> {
        self.site.at_entry(|| {
            pin_to(SENDER_CPU)?;
            generator.send_nowhere(frame, self.entry, packets)
        })
    }
}

/// Has everything come out where it must?
///
/// # Errors
/// What became of it otherwise.
pub fn judge(delivery: Delivery, sent: u64, before: &Arrivals, after: &Arrivals) -> Result<(), String> {
    let (mut right, mut wrong) = (0, 0);
    for (before, after) in before.iter().zip(after) {
        right += after.right - before.right;
        wrong += after.wrong - before.wrong;
    }
    let (wanted, strays) = match delivery {
        Delivery::Policy => (right == sent, wrong),
        Delivery::Anywhere => (right + wrong == sent, 0),
        Delivery::Nowhere => (right + wrong == 0, 0),
    };
    if wanted && strays == 0 {
        return Ok(());
    }
    let lost = sent.saturating_sub(right + wrong);
    Err(format!("of {sent} packets {lost} were lost and {wrong} left by the wrong device"))
}

impl Bench {
    /// Sends the case's packets through all places of the arena, in rounds.
    ///
    /// # Errors
    /// Packets cannot be sent at all.
    pub fn measure(&mut self, arena: &Arena<'_>, case: Case) -> Result<Vec<Measurement>> {
        let frame = Frame { family: case.family(), size: case.size };
        let prefixes = crate::prefixes::Prefixes { family: case.family(), count: case.prefixes };
        self.generator.set_flows(&flows(prefixes, case.pattern))?;
        let unit = Unit::NanosecondsPerPacket;
        let mut lost: Vec<Option<String>> = Vec::new();
        let mut packets = Vec::new();
        for place in &arena.places {
            place.site.set(case.sysctls)?;
            let (count, failure) = self.calibrate(place, frame)?;
            packets.push(count);
            lost.push(failure);
        }
        let baseline = arena.baseline()?;
        // After the places comes the generator.
        let generator_alone = arena.places.len();
        let (generator, slice) = (&self.generator, self.effort.slice);
        let values = interleave(arena.places.len() + 1, self.effort.rounds, &mut self.rng, |who| {
            if who == generator_alone {
                let sent = arena.places[baseline].generator_alone(generator, frame, packets_in(slice, 60.0) / 4)?;
                return Ok(Some(sent.nanoseconds_each()));
            }
            if lost[who].is_some() {
                return Ok(None);
            }
            match arena.places[who].slice(generator, frame, packets[who], case.cpus)? {
                Ok(sent) => Ok(Some(sent.nanoseconds_each())),
                Err(why) => {
                    lost[who] = Some(why);
                    Ok(None)
                }
            }
        })?;

        let name = |who: usize| arena.places.get(who).map_or(GENERATOR, |place| place.contestant.name());
        let mut measurements = arena.not_there(case, unit);
        for (who, mine) in values.iter().enumerate() {
            measurements.push(match lost.get(who).cloned().flatten() {
                Some(why) => Measurement::none(case, name(who), unit, Outcome::Disqualified(why)),
                None => Measurement::of(case, name(who), "", unit, mine.clone()).relative_to(&values[baseline]),
            });
        }
        Ok(measurements)
    }

    /// Roughly how long a packet takes in a place, whether or not it comes out where it must.
    ///
    /// # Errors
    /// It cannot be sent.
    pub fn nanoseconds_each(&self, place: &Place<'_>, frame: Frame) -> Result<f64> {
        let sent = place.site.at_entry(|| {
            pin_to(SENDER_CPU)?;
            self.generator.send(frame, place.entry, BATCH)?;
            self.generator.send(frame, place.entry, 2 * BATCH)
        })?;
        Ok(sent.nanoseconds_each())
    }

    /// Number of packets that a place forwards in this time.
    ///
    /// # Errors
    /// As [`Self::nanoseconds_each`].
    pub fn packets_in(&self, time: Duration, place: &Place<'_>, frame: Frame) -> Result<u32> {
        Ok(packets_in(time, self.nanoseconds_each(place, frame)?))
    }

    /// Number of packets that fill a slice, and whether the first ones came out.
    fn calibrate(&self, place: &Place<'_>, frame: Frame) -> Result<(u32, Option<String>)> {
        match place.slice(&self.generator, frame, BATCH, 1)? {
            Ok(first) => {
                let rough = packets_in(self.effort.slice / 8, first.nanoseconds_each());
                let second = place.slice(&self.generator, frame, rough, 1)?;
                let each = second.as_ref().map_or(first.nanoseconds_each(), Sent::nanoseconds_each);
                Ok((packets_in(self.effort.slice, each), second.err()))
            }
            Err(why) => Ok((0, Some(why))),
        }
    }
}

/// Number of packets that take as long as a slice at this many nanoseconds each.
fn packets_in(slice: Duration, nanoseconds: f64) -> u32 {
    let packets = slice.as_nanos() as f64 / nanoseconds;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "slices are short")]
    let packets = packets as u32;
    packets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Arrived;

    #[test]
    fn a_packet_lost_or_astray_is_noticed() {
        let before = [Arrived { right: 5, wrong: 1 }; 3];
        let after = |right: u64, wrong: u64| [before[0], Arrived { right: 5 + right, wrong: 1 + wrong }, before[2]];
        for (delivery, right, wrong, passes) in [
            (Delivery::Policy, 100, 0, true),
            (Delivery::Policy, 99, 0, false),
            (Delivery::Policy, 99, 1, false),
            (Delivery::Policy, 100, 1, false),
            (Delivery::Policy, 101, 0, false),
            (Delivery::Anywhere, 40, 60, true),
            (Delivery::Anywhere, 40, 59, false),
            (Delivery::Nowhere, 0, 0, true),
            (Delivery::Nowhere, 0, 1, false),
        ] {
            let judged = judge(delivery, 100, &before, &after(right, wrong));
            assert_eq!(judged.is_ok(), passes, "{delivery:?} {right} {wrong}");
        }
        let why = judge(Delivery::Policy, 100, &before, &after(90, 3)).expect_err("lost");
        assert_eq!(why, "of 100 packets 7 were lost and 3 left by the wrong device");
    }
}
