//! Plots as SVG files.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A line of a plot.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points; both coordinates above 0.
    pub points: Vec<(f64, f64)>,
}

/// Colours that are told apart with any eyesight (Okabe and Ito, and greys), in the order of the contestants.
const COLOURS: [RGBColor; 12] = [
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(140, 80, 20),
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(90, 90, 90),
    RGBColor(120, 120, 120),
    RGBColor(0, 158, 115),
    RGBColor(170, 170, 170),
    RGBColor(200, 200, 200),
];

/// Draws series over two logarithmic axes.
///
/// # Errors
/// The file cannot be written.
pub fn draw(path: &Path, title: &str, axes: (&str, &str), series: &[Series]) -> Result<()> {
    let points = || series.iter().flat_map(|series| &series.points);
    let range = |of: fn(&(f64, f64)) -> f64| {
        let low = points().map(of).fold(f64::MAX, f64::min);
        low..points().map(of).fold(low, f64::max) * 1.3
    };
    let (x, y) = (range(|point| point.0), range(|point| point.1));
    let failed = |error| anyhow!("cannot draw {}: {error}", path.display());
    let area = SVGBackend::new(path, (900, 520)).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(70)
            .right_y_label_area_size(150)
            .build_cartesian_2d((x.start..x.end).log_scale(), (y.start * 0.8..y.end).log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(RGBColor(240, 240, 240))
            .x_desc(axes.0)
            .y_desc(axes.1)
            .x_label_formatter(&|value| number(*value))
            .y_label_formatter(&|value| number(*value))
            .draw()?;
        for (series, colour) in series.iter().zip(COLOURS.into_iter().cycle()) {
            chart.draw_series(LineSeries::new(series.points.iter().copied(), colour.stroke_width(2)))?;
            chart.draw_series(series.points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
        }
        // Names at the right, in the order in which the lines end there, so that none needs to be looked up.
        let mut ends: Vec<(i32, &str, RGBColor)> = series
            .iter()
            .zip(COLOURS.into_iter().cycle())
            .filter_map(|(series, colour)| {
                Some((chart.backend_coord(series.points.last()?).1, series.name.as_str(), colour))
            })
            .collect();
        ends.sort_by_key(|(y, ..)| *y);
        let mut below = 0;
        for (y, name, colour) in ends {
            below = y.max(below + 15);
            let style = TextStyle::from(("sans-serif", 13)).color(&colour);
            area.draw(&Text::new(name.to_owned(), (757, below - 6), style))?;
        }
        area.present()?;
        Ok(())
    };
    draw().map_err(failed)
}

fn number(value: f64) -> String {
    if value >= 1e6 {
        format!("{}M", value / 1e6)
    } else if value >= 1e3 {
        format!("{}k", value / 1e3)
    } else if value >= 0.001 {
        format!("{}", (value * 1000.0).round() / 1000.0)
    } else {
        format!("{value:.0e}")
    }
}
