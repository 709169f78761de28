//! What the figures say, in sentences. Each is made from the record alone: another machine's says what it measured.

use tunroute::policy::net::Family;

use super::table::{amount, details, place, thousands, title};
use crate::{
    contestant::{
        BASELINE, FLAT_RULES as RULES, NFT, NULL, TUNROUTE_BOTH as BOTH, TUNROUTE_EBPF as EBPF,
        TUNROUTE_UNMATCHED as UNMATCHED,
    },
    load::Pattern,
    record::{Case, Measurement, Outcome, Record, Scenario, Unit},
    site::Target,
    stats::Estimate,
};

/// Rows of the first table: the case, and the time per packet by tunroute, by flat rules, by an nft map and without policy.
/// An empty cell was not measured, as it takes too long.
#[must_use]
pub fn savings(record: &Record) -> Vec<Vec<String>> {
    let shown = plain_cases(record).into_iter().filter(|case| [1, 1_000, 100_000, 1_000_000].contains(&case.prefixes));
    let row = |case: Case| {
        let cell = |name| record.find(&case, name).map_or_else(String::new, median);
        let fast = [BOTH, EBPF].into_iter().map(cell).find(|cell| !cell.is_empty())?;
        Some(vec![place(&case), format!("**{fast}**"), cell(RULES), cell(NFT), cell(BASELINE)])
    };
    shown.filter_map(row).collect()
}

/// What the fast path wins: against flat rules and forwarding without policy, in 64-byte packets into tun devices.
#[must_use]
pub fn gains(record: &Record) -> Vec<String> {
    let mut said = Vec::new();
    for case in plain_cases(record) {
        let Some(fast) = record.find(&case, BOTH).or_else(|| record.find(&case, EBPF)) else { continue };
        let mut sentence = format!("{}: {} takes {}", place(&case), fast.contestant, median(fast));
        for other in [RULES, NFT, "subtree", BASELINE] {
            if let Some(ratio) = record.find(&case, other).and_then(|other| record.ratio(fast, other)) {
                sentence += &format!("; {}", against(other, &ratio));
            }
        }
        said.push(sentence + ".");
    }
    said
}

/// What it loses or does not win.
#[must_use]
pub fn losses(record: &Record) -> Vec<String> {
    let mut said = Vec::new();
    for case in cases(record) {
        let find = |name| record.find(&case, name);
        let Some(baseline) = find(BASELINE) else { continue };
        if case.pattern == Pattern::Unmatched {
            for name in [UNMATCHED, BOTH, EBPF, RULES] {
                if let Some((measured, ratio)) = find(name).and_then(|m| Some((m, record.ratio(m, baseline)?))) {
                    said.push(format!(
                        "Unmatched traffic ({}): with {name} they take {}, {}.",
                        place(&case),
                        median(measured),
                        against(BASELINE, &ratio)
                    ));
                }
            }
        } else if case.target == Target::Vxlan {
            for name in [BOTH, EBPF] {
                if let Some((measured, ratio)) = find(name).and_then(|m| Some((m, record.ratio(m, baseline)?))) {
                    said.push(format!(
                        "Into vxlan, encapsulation included ({}, {}): {name} takes {}, {}.",
                        place(&case),
                        details(&case),
                        median(measured),
                        against(BASELINE, &ratio)
                    ));
                }
            }
        } else if case.prefixes == 1
            && case == Case::new(Scenario::Forward, case.family(), 1)
            && let Some((rules, ratio)) = find(RULES).and_then(|m| Some((m, record.ratio(m, baseline)?)))
        {
            said.push(format!(
                "The first rule ({}): with a single one a packet takes {}, {}. As `datapath = \"both\"` has rules, what its \
                 programs leave to the kernel pays for them, too; `\"ebpf\"` has none.",
                place(&case),
                median(rules),
                against(BASELINE, &ratio)
            ));
        }
        // Wherever the kernel alone, or what one would use instead, is faster beyond doubt.
        for name in [BOTH, EBPF] {
            let Some(fast) = find(name) else { continue };
            for other in [RULES, NFT, "subtree", BASELINE] {
                let special = case.pattern == Pattern::Unmatched || case.target == Target::Vxlan;
                if special && other == BASELINE {
                    continue;
                }
                if let Some(ratio) = find(other).and_then(|other| record.ratio(fast, other))
                    && ratio.low > 1.0
                {
                    said.push(format!("Slower than {other}: {name} ({}), {}.", title(&case), against(other, &ratio)));
                }
            }
        }
    }
    said
}

/// Reasons to doubt the run: the null comparison, wide intervals, lost packets.
#[must_use]
pub fn doubts(record: &Record) -> Vec<String> {
    let mut said = Vec::new();
    let nulls: Vec<&Measurement> = record
        .measurements
        .iter()
        .filter(|measurement| measurement.contestant == NULL && measurement.ratio.is_some())
        .collect();
    let within = |noise: fn(&Record, Scenario) -> f64| {
        let contains = |null: &&&Measurement| {
            null.ratio.is_some_and(|ratio| ratio.widened(noise(record, null.case.scenario)).contains(1.0))
        };
        nulls.iter().filter(contains).count()
    };
    let worst = nulls.iter().filter_map(|null| null.ratio).map(|ratio| (ratio.median - 1.0).abs()).fold(0.0, f64::max);
    said.push(format!(
        "The baseline took part twice, in two places: in {} of {} cases the interval of their ratio, from the rounds alone, \
         contains 1, and the ratio is never further from it than {:.1} %. What the rounds do not explain of it, {:.1} % for \
         forwarded packets, is due to the places, and part of the intervals in the sentences above: with it, {} contain 1.",
        within(|_, _| 0.0),
        nulls.len(),
        worst * 100.0,
        record.noise(Scenario::Forward) * 100.0,
        within(Record::noise)
    ));
    let wide = record.measurements.iter().filter(|measurement| super::table::is_uncertain(measurement)).count();
    said.push(format!(
        "{wide} of {} figures have an interval wider than ±{:.0} % and are marked as uncertain.",
        record.measurements.iter().filter(|measurement| measurement.estimate.is_some()).count(),
        super::table::TOO_WIDE * 100.0
    ));
    said.extend(record.machine.notes.iter().cloned());
    for measurement in &record.measurements {
        if let Outcome::Disqualified(why) = &measurement.outcome {
            let name = &measurement.contestant;
            said.push(format!("Disqualified: {name} ({}): {why}.", title(&measurement.case)));
        }
    }
    said
}

/// The sentence for the README: the case in which flat rules were still bearable with the most prefixes.
#[must_use]
pub fn headline(record: &Record) -> Option<String> {
    let case = plain_cases(record)
        .into_iter()
        .filter(|case| record.find(case, RULES).is_some())
        .max_by_key(|case| (case.prefixes, case.family() == Family::V4))?;
    let (fast, rules) = (record.find(&case, BOTH)?, record.find(&case, RULES)?);
    let mut text = format!(
        "With {} IPv{} prefixes a packet takes {} through the fast path and {} through the same number of `ip rule`s",
        thousands(f64::from(case.prefixes)),
        case.ip,
        median(fast),
        median(rules)
    );
    if let Some(baseline) = record.find(&case, BASELINE) {
        text += &format!(" ({} without any policy)", median(baseline));
    }
    let most = plain_cases(record).into_iter().filter(|other| other.ip == case.ip).max_by_key(|case| case.prefixes)?;
    if let Some(ebpf) = record.find(&most, EBPF).filter(|_| most.prefixes > case.prefixes) {
        text += &format!("; with {}, {}", thousands(f64::from(most.prefixes)), median(ebpf));
    }
    Some(text + ".")
}

fn cases(record: &Record) -> Vec<Case> {
    let mut cases: Vec<Case> = record.measurements.iter().map(|measurement| measurement.case).collect();
    cases.retain(|case| matches!(case.scenario, Scenario::Forward | Scenario::Host | Scenario::Cores));
    cases.dedup();
    cases
}

fn plain_cases(record: &Record) -> Vec<Case> {
    cases(record)
        .into_iter()
        .filter(|case| *case == Case::new(Scenario::Forward, case.family(), case.prefixes))
        .collect()
}

fn median(measurement: &Measurement) -> String {
    measurement.estimate.map_or_else(String::new, |estimate| amount(Unit::NanosecondsPerPacket, estimate.median))
}

/// A ratio in words: as the quotient that is above 1.
fn against(other: &str, ratio: &Estimate) -> String {
    if ratio.contains(1.0) {
        return format!(
            "no difference to {other} that could be told ({:.2} to {:.2} times its time)",
            ratio.low, ratio.high
        );
    }
    if ratio.median < 1.0 {
        let Estimate { median, low, high } = *ratio;
        format!("{:.2} times as fast as {other} ({:.2} to {:.2})", 1.0 / median, 1.0 / high, 1.0 / low)
    } else {
        format!("{:.2} times the time of {other} ({:.2} to {:.2})", ratio.median, ratio.low, ratio.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    fn record(case: Case, figures: &[(&str, f64)]) -> Record {
        let of = |&(name, value): &(&str, f64)| {
            Measurement::of(case, name, "", Unit::NanosecondsPerPacket, vec![value; 10]).relative_to(&[500.0; 10])
        };
        Record { machine: Machine::observe(Vec::new(), Vec::new()), measurements: figures.iter().map(of).collect() }
    }

    #[test]
    fn the_same_words_turn_with_the_figures() {
        let case = Case::new(Scenario::Forward, Family::V4, 1000);
        let wins = record(case, &[(BASELINE, 500.0), (RULES, 5000.0), (BOTH, 250.0)]);
        assert_eq!(
            gains(&wins),
            [
                "IPv4, 1,000 prefixes: tunroute-both takes 250 ns; 20.00 times as fast as ip-rules (20.00 to 20.00); 2.00 \
              times as fast as main-route (2.00 to 2.00)."
            ]
        );
        assert!(losses(&wins).is_empty());
        let loses = record(case, &[(BASELINE, 500.0), (RULES, 5000.0), (BOTH, 750.0)]);
        assert_eq!(
            losses(&loses),
            [
                "Slower than main-route: tunroute-both (Forwarding: IPv4, 1,000 prefixes, uniform sources, 64-byte frames \
              into tun), 1.50 times the time of main-route (1.50 to 1.50)."
            ]
        );
    }

    #[test]
    fn vxlan_and_unmatched_packets_are_always_told() {
        let plain = Case::new(Scenario::Forward, Family::V6, 1000);
        for case in [Case { target: Target::Vxlan, ..plain }, Case { pattern: Pattern::Unmatched, ..plain }] {
            let said = losses(&record(case, &[(BASELINE, 500.0), (BOTH, 490.0)]));
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].contains("1.02 times as fast as main-route"), "{said:?}");
        }
    }
}
