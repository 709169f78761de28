//! What the fast path is to reach, and how far it is: figures of one run, against its own floor.

use std::fmt;

use comfy_table::{ContentArrangement, Table, presets};
use tunroute::policy::net::Family;

use super::table::{amount, thousands};
use crate::{
    contestant::{FLAT_RULES, FLOOR, NFT, TUNROUTE_BOTH, TUNROUTE_EBPF, TUNROUTE_KERNEL, TUNROUTE_XDP},
    load::Pattern,
    record::{ACCESS, Case, LINES, LOOKUP, Measurement, ONE, Outcome, RECORD, Record, Scenario, TOLD, TRIE, Unit},
    site::{Sysctls, Target},
    stats::Estimate,
};

/// What became of a goal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// It is reached.
    Met,
    /// It is not; by which factor.
    Missed(f64),
    /// The interval contains it.
    Open,
    /// This run does not tell.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Met => f.write_str("met"),
            Self::Missed(factor) => write!(f, "missed by a factor of {factor:.2}"),
            Self::Open => f.write_str("too close to call"),
            Self::Unknown => f.write_str("not known"),
        }
    }
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Goal {
    /// What is measured.
    pub what: String,
    /// What it has to be.
    pub goal: String,
    /// What it is, or why that is not known.
    pub measured: String,
    /// What became of it.
    pub verdict: Verdict,
    /// What this run shows of why it is not reached.
    pub why: Option<String>,
}

impl Goal {
    /// With what the run shows, if the goal is not reached.
    fn because(mut self, why: impl FnOnce() -> Option<String>) -> Self {
        if matches!(self.verdict, Verdict::Missed(_) | Verdict::Open) {
            self.why = why();
        }
        self
    }
}

/// In which direction.
#[derive(Clone, Copy)]
enum Bound {
    AtMost,
    AtLeast,
}

/// How a value is written.
type Words = fn(f64) -> String;

/// All goals, in a fixed order.
#[must_use]
pub fn goals(record: &Record) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (family, limits) in [(Family::V4, [10.0, 20.0, 40.0]), (Family::V6, [20.0, 60.0, 100.0])] {
        for (prefixes, limit) in [1000, 100_000, 1_000_000].into_iter().zip(limits) {
            let case = Case::new(Scenario::Decision, family, prefixes);
            let what = format!("{}: the lookup, as a decision more than with one prefix", case_words(&case));
            let nanoseconds: Words = |value| amount(Unit::NanosecondsPerPacket, value);
            let more =
                added(record, &case).zip(added(record, &Case { prefixes: 1, ..case })).map(|(all, one)| all.minus(one));
            let goal = judged(record, what, &case, more, (Bound::AtMost, limit), nanoseconds);
            goals.push(goal.because(|| reads(record, &case)));
            let what = format!("{}: the whole decision, added to a constant redirect", case_words(&case));
            let goal = judged(record, what, &case, added(record, &case), (Bound::AtMost, limit), nanoseconds);
            goals.push(goal.because(|| besides_the_lookup(record, &case)));
        }
    }
    let forward = |prefixes| Case::new(Scenario::Forward, Family::V4, prefixes);
    for (prefixes, limit) in [(1000, 0.95), (1_000_000, 0.88)] {
        let what =
            format!("{}: packets per second, as a part of the constant redirect's", case_words(&forward(prefixes)));
        let goal = times(record, what, forward(prefixes), FLOOR, limit, |value| format!("{:.0} %", value * 100.0));
        goals.push(goal.because(|| room(record, &forward(prefixes), limit)));
    }
    for (prefixes, default, tuned) in [(1, 3.4, Some(2.0)), (1000, 70.0, Some(15.0)), (10_000, 700.0, None)] {
        let mut add = |sysctls, limit| {
            let case = Case { sysctls, ..forward(prefixes) };
            let what = format!("{}: against flat rules", case_words(&case));
            goals.push(times(record, what, case, FLAT_RULES, limit, factor).because(|| at_best(record, &case, limit)));
        };
        add(Sysctls::Default, default);
        if let Some(tuned) = tuned {
            add(Sysctls::AcceptLocal, tuned);
        }
    }
    for (prefixes, limit) in [(1000, 3.0), (100_000, 5.0), (1_000_000, 6.5)] {
        let what = format!("{}: against the nft map", case_words(&forward(prefixes)));
        goals.push(times(record, what, forward(prefixes), NFT, limit, factor));
    }
    let mut early = |case: Case, what: &str, limit, words: Words| {
        let found = record.find(&case, TUNROUTE_XDP).zip(record.find(&case, TUNROUTE_EBPF));
        let estimate = found.and_then(|(early, late)| record.ratio(early, late));
        let what = format!("{}: {what}, as a part of what it takes without XDP", case_words(&case));
        goals.push(judged(record, what, &case, estimate, (Bound::AtMost, limit), words));
    };
    for (prefixes, limit) in [(1, 0.6), (1000, 0.6), (10_000, 1.0), (100_000, 1.0), (1_000_000, 1.0)] {
        let case = Case { target: Target::Veth, ..Case::new(Scenario::Forward, Family::V6, prefixes) };
        early(case, "a packet by XDP into a veth device", limit, |value| format!("{value:.2}"));
    }
    for family in Family::ALL {
        let case = Case::new(Scenario::Forward, family, 1000);
        let case = Case { target: Target::Veth, pattern: Pattern::Unmatched, ..case };
        early(case, "a packet that XDP leaves to the kernel", 1.1, |value| format!("{value:.2}"));
    }
    goals.push(kernel_datapath(record));
    for (family, bytes, seconds) in [(Family::V4, 8.0, 0.15), (Family::V6, 24.0, 0.4)] {
        goals.extend(memory(record, family, bytes));
        let engine = Case::new(Scenario::Publish, family, 1_000_000);
        for (figure, what) in [(TRIE, "the trie compiled and published"), ("", "from policies to a published trie")] {
            goals.push(plain(record, format!("{}: {what}", case_words(&engine)), engine, figure, seconds));
        }
        let case = Case { scenario: Scenario::Install, ..engine };
        let what = format!("{}: from the daemon's start to its readiness", case_words(&case));
        goals.push(plain(record, what, case, "", seconds).because(|| around(record, &engine, "")));
        let what = format!("{}: one of them changed where programs read it", case_words(&engine));
        goals.push(plain(record, what, engine, ONE, 0.001));
        let case = Case { scenario: Scenario::Change, ..case };
        let what = format!("{}: one of them changed, from the reload until packets follow", case_words(&case));
        goals.push(plain(record, what, case, ONE, 0.001).because(|| around(record, &engine, ONE)));
        let case = Case { scenario: Scenario::Failover, prefixes: largest(record, Scenario::Failover), ..case };
        let what = format!(
            "{}: failover, from when the kernel told that the device was down until packets follow",
            case_words(&case)
        );
        goals.push(plain(record, what, case, TOLD, 0.0003));
    }
    goals
}

/// The goals as a table for the terminal.
#[must_use]
pub fn table(record: &Record) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["", "goal", "measured", ""]);
    for Goal { what, goal, measured, verdict, .. } in goals(record) {
        table.add_row([what, goal, measured, verdict.to_string()]);
    }
    format!("Goals\n{table}\n")
}

/// The fast path with rules, or without where that is not bearable.
fn fast<'a>(record: &'a Record, case: &Case, figure: &str) -> Option<&'a Measurement> {
    [TUNROUTE_BOTH, TUNROUTE_EBPF].into_iter().find_map(|name| record.figure(case, name, figure))
}

/// What a decision takes more than the floor.
fn added(record: &Record, case: &Case) -> Option<Estimate> {
    let (fast, floor) = fast(record, case, "").zip(record.find(case, FLOOR))?;
    Estimate::of_difference(&fast.values, &floor.values)
}

/// Ratio of packets forwarded: fast path to another contestant.
fn times(record: &Record, what: String, case: Case, other: &str, limit: f64, words: Words) -> Goal {
    let found = fast(record, &case, "").zip(record.find(&case, other));
    let estimate = found.and_then(|(fast, other)| record.ratio(other, fast));
    let mut goal = judged(record, what, &case, estimate, (Bound::AtLeast, limit), words);
    if estimate.is_none()
        && let Some(why) = record.why_not(&case, other)
    {
        goal.measured = format!("{other}: {}", reason(why));
    }
    goal
}

/// What a lookup reads, and what a read takes.
fn reads(record: &Record, case: &Case) -> Option<String> {
    let of = |figure, unit| Some(amount(unit, engine(record, case, figure)?));
    let (lines, access) = (of(LINES, Unit::Number)?, of(ACCESS, Unit::NanosecondsPerPacket)?);
    let lookup = of(LOOKUP, Unit::Bytes)?;
    Some(format!(
        "a lookup reads {lines} cache lines of {lookup} one after the other, the header's and the sources' among them, which \
         all lookups share; on this machine such a read in the map's memory takes {access} where nothing else needs the \
         caches"
    ))
}

/// What of a decision is not the lookup.
fn besides_the_lookup(record: &Record, case: &Case) -> Option<String> {
    let one = added(record, &Case { prefixes: 1, ..*case })?.median;
    Some(format!(
        "with a single prefix it is {} more than the constant redirect already: headers, the policy's entry, hop limit, MTU \
         and counters",
        amount(Unit::NanosecondsPerPacket, one)
    ))
}

/// What the goal leaves of a packet's time for the decision.
fn room(record: &Record, case: &Case, limit: f64) -> Option<String> {
    let floor = record.find(case, FLOOR)?.estimate?.median;
    let takes = added(record, &Case { scenario: Scenario::Decision, ..*case })?.median;
    let words = |value| amount(Unit::NanosecondsPerPacket, value);
    Some(format!(
        "with the constant redirect a packet takes {}, of which the goal leaves {} for what is decided; that takes {}",
        words(floor),
        words(floor / limit - floor),
        words(takes)
    ))
}

/// What the goal leaves for a decision, if a program that decides nothing reaches it.
fn at_best(record: &Record, case: &Case, limit: f64) -> Option<String> {
    let (rules, floor) = (record.find(case, FLAT_RULES)?, record.find(case, FLOOR)?);
    let best = record.ratio(rules, floor)?.median;
    if best < limit {
        let best = factor(best);
        return Some(format!(
            "the constant redirect, which looks at nothing, is but {best} as fast as flat rules here"
        ));
    }
    let left = floor.estimate?.median * (best / limit - 1.0);
    let plain = Case::new(Scenario::Decision, case.family(), case.prefixes);
    let words = |value| amount(Unit::NanosecondsPerPacket, value);
    Some(format!(
        "beyond the constant redirect, which looks at nothing, the goal leaves {} for what is decided; that takes {}",
        words(left),
        words(added(record, &plain)?.median)
    ))
}

/// What the maps are for, in bytes for each prefix.
fn maps(record: &Record, family: Family) -> Option<String> {
    let case = Case::new(Scenario::Memory, family, largest(record, Scenario::Memory));
    let prefixes = f64::from(case.prefixes);
    let all = fast(record, &case, "maps")?.estimate?.median / prefixes;
    let of = |figure| Some(engine(record, &case, figure)? / prefixes);
    let (lookup, listed) = (of(LOOKUP)?, of(RECORD)?);
    Some(format!(
        "of these, {lookup:.1} B are what the programs look prefixes up in, and {listed:.1} B what a daemon that starts \
         reads them from; {:.1} B are room for changes, slots and counters",
        all - lookup - listed
    ))
}

/// What of the daemon's time is the prefix engine's.
fn around(record: &Record, case: &Case, figure: &str) -> Option<String> {
    let words = |figure| Some(amount(Unit::Seconds, engine(record, case, figure)?));
    let all = words("")?;
    Some(if figure == ONE {
        format!(
            "{} of it are for the change itself; a reload reads, checks and compares all prefixes, where compiling and \
             publishing them takes {all}",
            words(ONE)?
        )
    } else {
        format!(
            "{all} of it are for compiling and publishing; the rest is for reading and checking the configuration, and for \
             loading the programs, which the kernel verifies"
        )
    })
}

/// A figure of the prefix engine with this number of prefixes.
fn engine(record: &Record, case: &Case, figure: &str) -> Option<f64> {
    let case = Case::new(Scenario::Publish, case.family(), case.prefixes);
    Some(record.figure(&case, TUNROUTE_EBPF, figure)?.estimate?.median)
}

fn kernel_datapath(record: &Record) -> Goal {
    let case = Case::new(Scenario::Forward, Family::V4, 10_000);
    let what = format!("{}: the kernel datapath's time, against the nft map's", case_words(&case));
    let found = record.find(&case, TUNROUTE_KERNEL).zip(record.find(&case, NFT));
    let estimate = found.and_then(|(kernel, nft)| record.ratio(kernel, nft));
    judged(record, what, &case, estimate, (Bound::AtMost, 1.3), factor)
}

fn memory(record: &Record, family: Family, limit: f64) -> [Goal; 2] {
    let case = Case::new(Scenario::Memory, family, largest(record, Scenario::Memory));
    let published = Case { scenario: Scenario::Publish, ..case };
    let lookup = record.figure(&published, TUNROUTE_EBPF, LOOKUP);
    let goal = |what: &str, measured: Option<&Measurement>| {
        let each = measured.and_then(|measured| {
            Estimate::of(&measured.values.iter().map(|bytes| bytes / f64::from(case.prefixes)).collect::<Vec<_>>())
        });
        let what = format!("{}: {what}, for each prefix", case_words(&case));
        judged(record, what, &case, each, (Bound::AtMost, limit), |value| format!("{value:.1} B"))
    };
    [
        goal("what prefixes are looked up in", lookup),
        goal("all BPF maps", fast(record, &case, "maps")).because(|| maps(record, family)),
    ]
}

fn plain(record: &Record, what: String, case: Case, figure: &str, limit: f64) -> Goal {
    let estimate = fast(record, &case, figure).and_then(|measured| measured.estimate);
    judged(record, what, &case, estimate, (Bound::AtMost, limit), |value| amount(Unit::Seconds, value))
}

fn judged(
    record: &Record,
    what: String,
    case: &Case,
    estimate: Option<Estimate>,
    (bound, limit): (Bound, f64),
    words: Words,
) -> Goal {
    let sign = match bound {
        Bound::AtMost => "at most",
        Bound::AtLeast => "at least",
    };
    let goal = format!("{sign} {}", words(limit));
    let Some(Estimate { median, low, high }) = estimate else {
        let why = [TUNROUTE_BOTH, TUNROUTE_EBPF].into_iter().find_map(|name| record.why_not(case, name));
        let measured = why.map_or_else(|| "not part of this run".to_owned(), |why| reason(why).to_owned());
        return Goal { what, goal, measured, verdict: Verdict::Unknown, why: None };
    };
    let verdict = match bound {
        Bound::AtMost if high <= limit => Verdict::Met,
        Bound::AtLeast if low >= limit => Verdict::Met,
        Bound::AtMost if low > limit => Verdict::Missed(median / limit),
        Bound::AtLeast if high < limit => Verdict::Missed(limit / median),
        _ => Verdict::Open,
    };
    let interval = if low == high { String::new() } else { format!(" ({} to {})", words(low), words(high)) };
    Goal { what, goal, measured: format!("{}{interval}", words(median)), verdict, why: None }
}

fn reason(outcome: &Outcome) -> &str {
    match outcome {
        Outcome::Disqualified(why) | Outcome::Stopped(why) | Outcome::Declined(why) => why,
        Outcome::Measured => "measured",
    }
}

fn factor(value: f64) -> String {
    if value < 100.0 { format!("{value:.1} ×") } else { format!("{} ×", thousands(value)) }
}

fn case_words(case: &Case) -> String {
    match case.sysctls {
        Sysctls::Default => super::table::place(case),
        tuned => format!("{}, {tuned}", super::table::place(case)),
    }
}

/// The largest number of prefixes of a scenario.
fn largest(record: &Record, scenario: Scenario) -> u32 {
    let cases = record.measurements.iter().map(|measurement| measurement.case);
    cases.filter(|case| case.scenario == scenario).map(|case| case.prefixes).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    fn record(measurements: Vec<Measurement>) -> Record {
        Record { machine: Machine::observe(Vec::new(), Vec::new()), measurements }
    }

    fn found(record: &Record, what: &str) -> Goal {
        goals(record).into_iter().find(|goal| goal.what == what).expect("there is such a goal")
    }

    #[test]
    fn goals_are_judged_by_intervals() {
        let case = Case::new(Scenario::Decision, Family::V4, 1000);
        let unit = Unit::NanosecondsPerPacket;
        let floor = Measurement::of(case, FLOOR, "", unit, vec![30.0; 20]);
        let what = "IPv4, 1,000 prefixes: the whole decision, added to a constant redirect";
        for (fast, measured, verdict) in [
            (vec![38.0; 20], "8.00 ns", Verdict::Met),
            (vec![55.0; 20], "25 ns", Verdict::Missed(2.5)),
            ((0..20).map(|n| f64::from(35 + n % 11)).collect(), "9.00 ns (7.00 ns to 12 ns)", Verdict::Open),
        ] {
            let fast = Measurement::of(case, TUNROUTE_EBPF, "", unit, fast);
            let goal = found(&record(vec![floor.clone(), fast]), what);
            assert_eq!((goal.goal.as_str(), goal.verdict), ("at most 10 ns", verdict), "{goal:?}");
            if verdict != Verdict::Open {
                assert_eq!(goal.measured, measured);
            }
        }
    }

    #[test]
    fn what_is_missed_says_what_the_run_shows_of_it() {
        let case = Case::new(Scenario::Publish, Family::V4, 1_000_000);
        let of = |figure, unit, value| Measurement::of(case, TUNROUTE_EBPF, figure, unit, vec![value; 5]);
        let change = Case { scenario: Scenario::Change, ..case };
        let reload = Measurement::of(change, TUNROUTE_EBPF, ONE, Unit::Seconds, vec![0.5; 5]);
        let record = record(vec![of("", Unit::Seconds, 0.12), of(ONE, Unit::Seconds, 0.000_02), reload]);
        let goal = |what: &str| found(&record, &format!("IPv4, 1,000,000 prefixes: {what}"));
        for (what, verdict, why) in [
            ("from policies to a published trie", Verdict::Met, None),
            ("one of them changed where programs read it", Verdict::Met, None),
            (
                "one of them changed, from the reload until packets follow",
                Verdict::Missed(500.0),
                Some(
                    "20 µs of it are for the change itself; a reload reads, checks and compares all prefixes, where \
                     compiling and publishing them takes 120 ms",
                ),
            ),
        ] {
            let goal = goal(what);
            assert_eq!((goal.verdict, goal.why.as_deref()), (verdict, why), "{what}");
        }
    }

    #[test]
    fn what_was_stopped_says_so() {
        let case = Case::new(Scenario::Forward, Family::V4, 10_000);
        let unit = Unit::NanosecondsPerPacket;
        let fast = Measurement::of(case, TUNROUTE_BOTH, "", unit, vec![400.0; 20]);
        let stopped = Outcome::Stopped("it takes too long".to_owned());
        let rules = Measurement::none(case, FLAT_RULES, unit, stopped);
        let goal = found(&record(vec![fast, rules]), "IPv4, 10,000 prefixes: against flat rules");
        assert_eq!((goal.measured.as_str(), goal.verdict), ("ip-rules: it takes too long", Verdict::Unknown));
    }
}
