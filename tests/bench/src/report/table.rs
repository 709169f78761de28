//! The record as tables in the terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::{
    record::{Case, Measurement, Outcome, Record, Unit},
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
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header([
            "",
            "median",
            "95 % interval",
            "ratio to main-route",
        ]);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for measurement in measurements {
            let name = format!("{} {}", measurement.contestant, measurement.figure);
            table.add_row([name, figure(measurement), interval(measurement), ratio(measurement)]);
        }
        text += &format!("\n{}\n{table}\n", title(&case));
    }
    text
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
    format!(
        "{:?}: IPv{}, {} prefixes, {} sources, {} byte frames into {}, sysctls {}, {} CPU",
        case.scenario, case.ip, case.prefixes, case.pattern, case.size, case.target, case.sysctls, case.cpus
    )
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
        Unit::Bytes if value < 1e6 => format!("{} kB", digits(value / 1e3)),
        Unit::Bytes => format!("{} MB", digits(value / 1e6)),
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
    use super::*;

    #[test]
    fn amounts_have_units_and_two_digits() {
        for (unit, value, expected) in [
            (Unit::NanosecondsPerPacket, 307.4, "307 ns"),
            (Unit::NanosecondsPerPacket, 245_123.0, "245,123 ns"),
            (Unit::Seconds, 0.000_123, "123 µs"),
            (Unit::Seconds, 0.7, "700 ms"),
            (Unit::Seconds, 2.345, "2.35 s"),
            (Unit::Bytes, 145e6, "145 MB"),
            (Unit::Bytes, 6400.0, "6.40 kB"),
        ] {
            assert_eq!(amount(unit, value), expected);
        }
    }
}
