//! The record as tables in the terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::{
    record::{Case, Measurement, Outcome, Record, Unit},
    site::Sysctls,
    stats::Estimate,
};

/// An estimate whose interval reaches further than this part of it to either side is too uncertain to be read as a
/// figure.
pub const TOO_WIDE: f64 = 0.1;

/// All cases, one table each.
#[must_use]
pub fn tables(record: &Record) -> String {
    let mut text = String::new();
    for (case, measurements) in by_case(record) {
        let mut table = Table::new();
        let columns = columns(&case, &measurements);
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(std::iter::once(String::new()).chain(columns.iter().map(Column::heading)));
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for measurement in measurements {
            table.add_row(
                std::iter::once(name(measurement)).chain(columns.iter().map(|column| column.cell(measurement))),
            );
        }
        text += &format!("\n{}\n{table}\n", title(&case));
    }
    text
}

/// A column of a case's table, after the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// The median, or why there is none.
    Median,
    /// Millions of packets in a second.
    Rate,
    /// The median's interval.
    Interval,
    /// The ratio to a baseline.
    Ratio(&'static str),
}

impl Column {
    /// What stands above it.
    #[must_use]
    pub fn heading(&self) -> String {
        match self {
            Self::Median => "median".to_owned(),
            Self::Rate => "Mpps".to_owned(),
            Self::Interval => "95 % interval".to_owned(),
            Self::Ratio(baseline) => format!("ratio to {baseline}"),
        }
    }

    /// What stands in it.
    #[must_use]
    pub fn cell(&self, measurement: &Measurement) -> String {
        match self {
            Self::Median => figure(measurement),
            Self::Rate => measurement.estimate.map_or_else(String::new, |estimate| {
                // Nanoseconds for a packet to millions of packets in a second.
                let rate = 1000.0 / estimate.median;
                if rate < 0.1 { format!("{rate:.4}") } else { format!("{rate:.2}") }
            }),
            Self::Interval => interval(measurement),
            Self::Ratio(_) => ratio(measurement),
        }
    }
}

/// The columns of a case's table.
#[must_use]
pub fn columns(case: &Case, measurements: &[&Measurement]) -> Vec<Column> {
    let mut columns = vec![Column::Median];
    if case.scenario.has_load() {
        columns.push(Column::Rate);
    }
    if measurements.iter().any(|measurement| measurement.values.len() > 1) {
        columns.push(Column::Interval);
    }
    if measurements.iter().any(|measurement| measurement.ratio.is_some()) {
        columns.push(Column::Ratio(case.scenario.baseline()));
    }
    columns
}

/// The contestant, and which of its figures this is.
#[must_use]
pub fn name(measurement: &Measurement) -> String {
    match measurement.figure.as_str() {
        "" => measurement.contestant.clone(),
        figure => format!("{}, {figure}", measurement.contestant),
    }
}

/// The cases in their order, with their measurements.
#[must_use]
pub fn by_case(record: &Record) -> Vec<(Case, Vec<&Measurement>)> {
    let mut cases: Vec<(Case, Vec<&Measurement>)> = Vec::new();
    for measurement in &record.measurements {
        match cases.iter_mut().find(|(case, _)| *case == measurement.case) {
            Some((_, measurements)) => measurements.push(measurement),
            None => cases.push((measurement.case, vec![measurement])),
        }
    }
    cases
}

/// A case in words.
#[must_use]
pub fn title(case: &Case) -> String {
    format!("{}: {}, {}", sentence_case(&case.scenario.to_string()), place(case), details(case))
        .trim_end_matches([',', ' '])
        .to_owned()
}

/// The family and the number of prefixes.
#[must_use]
pub fn place(case: &Case) -> String {
    let count = thousands(f64::from(case.prefixes));
    format!("IPv{}, {count} {}", case.ip, if case.prefixes == 1 { "prefix" } else { "prefixes" })
}

/// What else there is to know of a case: what differs from the plain one, and the packets where they matter.
#[must_use]
pub fn details(case: &Case) -> String {
    let mut details = Vec::new();
    if case.scenario.has_load() {
        details.push(format!("{} sources", case.pattern));
        details.push(format!("{}-byte frames into {}", case.size, case.target));
    }
    if case.sysctls != Sysctls::Default {
        details.push(case.sysctls.to_string());
    }
    if case.cpus > 1 {
        details.push(format!("{} CPUs", case.cpus));
    }
    details.join(", ")
}

fn sentence_case(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}

/// The median with its unit, or why there is none.
#[must_use]
pub fn figure(measurement: &Measurement) -> String {
    match (&measurement.outcome, measurement.estimate) {
        (Outcome::Measured, Some(estimate)) => {
            let doubt = if is_uncertain(measurement) { " (uncertain)" } else { "" };
            format!("{}{doubt}", amount(measurement.unit, estimate.median))
        }
        (Outcome::Measured, None) => "not measured".to_owned(),
        (Outcome::Disqualified(why), _) => format!("disqualified: {why}"),
        (Outcome::Stopped(why) | Outcome::Declined(why), _) => why.clone(),
    }
}

/// Is the interval too wide?
#[must_use]
pub fn is_uncertain(measurement: &Measurement) -> bool {
    measurement.estimate.is_some_and(|estimate| estimate.uncertainty() > TOO_WIDE)
}

/// A value with its unit.
#[must_use]
pub fn amount(unit: Unit, value: f64) -> String {
    match unit {
        Unit::NanosecondsPerPacket => format!("{} ns", digits(value)),
        Unit::Microseconds => format!("{} µs", digits(value)),
        Unit::Seconds if value < 0.001 => format!("{} µs", digits(value * 1e6)),
        Unit::Seconds if value < 1.0 => format!("{} ms", digits(value * 1e3)),
        Unit::Seconds => format!("{} s", digits(value)),
        // Less is better in a record; people think of speed.
        Unit::SecondsPerGigabyte => format!("{} Gbit/s", digits(8.0 / value)),
        Unit::Bytes if value.abs() < 1e6 => format!("{} kB", digits(value / 1e3)),
        Unit::Bytes => format!("{} MB", digits(value / 1e6)),
        Unit::Number => digits(value),
    }
}

/// At least two significant digits; thousands are set apart.
fn digits(value: f64) -> String {
    if value < 10.0 {
        return format!("{value:.2}");
    }
    thousands(value)
}

/// A whole number, with thousands set apart.
#[must_use]
pub fn thousands(value: f64) -> String {
    let plain = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in plain.chars().enumerate() {
        if index > 0 && (plain.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The interval, or that there is none.
#[must_use]
pub fn interval(measurement: &Measurement) -> String {
    let Some(Estimate { low, high, .. }) = measurement.estimate else { return String::new() };
    if measurement.values.len() < 2 {
        return "one value".to_owned();
    }
    let (low, high) = if measurement.unit == Unit::SecondsPerGigabyte { (high, low) } else { (low, high) };
    format!("{} – {}", amount(measurement.unit, low), amount(measurement.unit, high))
}

/// The ratio to the baseline, with its interval.
#[must_use]
pub fn ratio(measurement: &Measurement) -> String {
    let Some(Estimate { median, low, high }) = measurement.ratio else { return String::new() };
    format!("{median:.2} ({low:.2} – {high:.2})")
}

#[cfg(test)]
mod tests {
    use tunroute::policy::net::Family;

    use super::*;
    use crate::record::Scenario;

    #[test]
    fn titles_are_words() {
        let plain = |scenario| Case::new(scenario, Family::V4, 1000);
        for (case, expected) in [
            (plain(Scenario::Forward), "Forwarding: IPv4, 1,000 prefixes, uniform sources, 64-byte frames into tun"),
            (plain(Scenario::Failover), "Failover: IPv4, 1,000 prefixes"),
            (
                Case { cpus: 2, sysctls: Sysctls::AcceptLocal, prefixes: 1, ..plain(Scenario::Cores) },
                "Forwarding on all CPUs: IPv4, 1 prefix, uniform sources, 64-byte frames into tun, accept_local=1, 2 CPUs",
            ),
        ] {
            assert_eq!(title(&case), expected);
        }
    }

    #[test]
    fn amounts_have_units_and_two_digits() {
        for (unit, value, expected) in [
            (Unit::NanosecondsPerPacket, 307.4, "307 ns"),
            (Unit::NanosecondsPerPacket, 245_123.0, "245,123 ns"),
            (Unit::Seconds, 0.000_123, "123 µs"),
            (Unit::Seconds, 0.7, "700 ms"),
            (Unit::Seconds, 2.345, "2.35 s"),
            (Unit::Bytes, 145e6, "145 MB"),
            (Unit::SecondsPerGigabyte, 0.4, "20 Gbit/s"),
            (Unit::Bytes, 6400.0, "6.40 kB"),
        ] {
            assert_eq!(amount(unit, value), expected);
        }
    }
}
