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

/// Size of a plot, and width of the column of names at its right, in pixels.
const SIZE: (u32, u32) = (900, 480);
const NAMES: u32 = 150;
/// Height of a name, in pixels.
const LINE: i32 = 16;

/// Colour of a contestant, the same in every plot: told apart with any eyesight (Okabe and Ito).
fn colour(name: &str) -> RGBColor {
    match name {
        "ip-rules" => RGBColor(213, 94, 0),
        "nft-map" => RGBColor(204, 121, 167),
        "subtree" => RGBColor(190, 130, 0),
        "tunroute-both" => RGBColor(0, 158, 115),
        "tunroute-ebpf" => RGBColor(0, 114, 178),
        "tunroute-kernel" => RGBColor(140, 80, 20),
        "main-route" => RGBColor(0, 0, 0),
        _ => RGBColor(110, 110, 110),
    }
}

/// Places names beside the ends of their lines, moved apart so that none covers another, within `0..height`.
fn spread(ends: &mut [i32], height: i32) {
    let mut free = 0;
    for end in ends.iter_mut() {
        *end = (*end).max(free);
        free = *end + LINE;
    }
    let mut limit = height - LINE;
    for end in ends.iter_mut().rev() {
        *end = (*end).min(limit);
        limit = *end - LINE;
    }
}

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
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        // Painted, so that it can be read on a dark page, too.
        area.fill(&WHITE)?;
        let (left, right) = area.split_horizontally(SIZE.0 - NAMES);
        let mut chart = ChartBuilder::on(&left)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(70)
            .build_cartesian_2d((x.start..x.end).log_scale(), (y.start * 0.8..y.end).log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(RGBColor(245, 245, 245))
            .bold_line_style(RGBColor(225, 225, 225))
            .x_desc(axes.0)
            .y_desc(axes.1)
            .x_label_formatter(&|value| number(*value))
            .y_label_formatter(&|value| number(*value))
            .draw()?;
        let mut ends: Vec<(i32, &str)> = Vec::new();
        for Series { name, points } in series {
            let colour = colour(name);
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
            ends.extend(points.last().map(|end| (chart.backend_coord(end).1 - LINE / 2, name.as_str())));
        }
        ends.sort_by_key(|(y, _)| *y);
        let mut places: Vec<i32> = ends.iter().map(|(y, _)| *y).collect();
        spread(&mut places, i32::try_from(SIZE.1)?);
        for (place, (_, name)) in places.into_iter().zip(ends) {
            let colour = colour(name);
            let style = TextStyle::from(("sans-serif", 13)).color(&colour);
            right.draw(&Text::new(name.to_owned(), (2, place), style))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_cover_each_other() {
        for (mut ends, expected) in [
            (vec![10, 100, 200], vec![10, 100, 200]),
            (vec![10, 12, 13], vec![10, 26, 42]),
            (vec![470, 475, 478], vec![432, 448, 464]),
            (vec![-5], vec![0]),
        ] {
            spread(&mut ends, 480);
            assert_eq!(ends, expected);
        }
    }
}
