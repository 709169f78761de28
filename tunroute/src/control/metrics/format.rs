//! The two text formats: OpenMetrics, and the older one, which is converted from it.

use std::borrow::Cow;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// <https://prometheus.io/docs/specs/om/open_metrics_spec/>
    OpenMetrics,
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/>, for all other readers.
    Text,
}

/// The media type of OpenMetrics.
const OPENMETRICS: &str = "application/openmetrics-text";

impl Format {
    /// The format that a reader's `Accept` header asks for.
    #[must_use]
    pub fn accepted(accept: Option<&str>) -> Self {
        let ranges = accept.unwrap_or_default().split(',').filter_map(|range| range.split(';').next());
        match ranges.map(str::trim).find(|range| range.eq_ignore_ascii_case(OPENMETRICS)) {
            Some(_) => Self::OpenMetrics,
            None => Self::Text,
        }
    }

    /// The `Content-Type` header.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Metrics in this format. In the older one a counter has the name of its sample, `…_total`, and no line marks the end.
    #[must_use]
    pub fn write(self, openmetrics: &str) -> Cow<'_, str> {
        if self == Self::OpenMetrics {
            return openmetrics.into();
        }
        let about =
            |line: &str, what: &str| line.strip_prefix(what).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
        let counters: Vec<String> = openmetrics
            .lines()
            .filter(|line| line.ends_with(" counter"))
            .filter_map(|line| about(line, "# TYPE "))
            .collect();
        let mut text = String::with_capacity(openmetrics.len());
        for line in openmetrics.lines().filter(|line| *line != "# EOF") {
            let described = ["# HELP ", "# TYPE "].into_iter().find_map(|what| Some((what, about(line, what)?)));
            match described.filter(|(_, name)| counters.contains(name)) {
                Some((what, name)) => {
                    let rest = line.get(what.len() + name.len()..).unwrap_or_default();
                    text.extend([what, &name, "_total", rest]);
                }
                None => text.push_str(line),
            }
            text.push('\n');
        }
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_what_it_asks_for() {
        // As Prometheus 2.42 asks, and curl.
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for (accept, expected) in [
            (Some(prometheus), Format::OpenMetrics),
            (Some("text/plain, Application/OpenMetrics-Text"), Format::OpenMetrics),
            (Some("*/*"), Format::Text),
            (None, Format::Text),
        ] {
            assert_eq!(Format::accepted(accept), expected, "{accept:?}");
        }
    }

    #[test]
    fn the_older_format_differs_in_counters() {
        let openmetrics = "# HELP a_total_b Not one.\n# TYPE a_total_b gauge\na_total_b 1.0\n# HELP repairs Times.\n\
                           # TYPE repairs counter\nrepairs_total{x=\"# TYPE repairs counter\"} 3\n# EOF\n";
        let text = "# HELP a_total_b Not one.\n# TYPE a_total_b gauge\na_total_b 1.0\n# HELP repairs_total Times.\n\
                    # TYPE repairs_total counter\nrepairs_total{x=\"# TYPE repairs counter\"} 3\n";
        assert_eq!(Format::Text.write(openmetrics), text);
        assert_eq!(Format::OpenMetrics.write(openmetrics), openmetrics);
    }
}
