//! `cargo xtask bench`

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use fastrand::Rng;
use tunroute_bench::{
    compare::{Change, Verdict, compare},
    contestant::{self, Contestant},
    generator::{Generator, pin_to},
    limits::Limits,
    machine::Machine,
    record::Record,
    report::{goals, markdown, table},
    scenario::{
        Bench, Effort, Progress,
        stages::{self, stages},
    },
    site::{self, LAN_MACS},
};

/// What tunroute's fast path saves and costs on this machine, against what one would use instead.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Cli {
    /// Less of everything: under two minutes.
    #[arg(long)]
    quick: bool,
    /// Leave out what has not begun after so many seconds: 600 unless told, or 100 with `--quick`.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Where the record goes, as lines of JSON.
    #[arg(long, value_name = "FILE", default_value = "target/bench.jsonl")]
    output: PathBuf,
    /// Compare with an older record, and end with status 1 if anything has become slower beyond noise.
    #[arg(long, value_name = "OLD.jsonl")]
    compare: Option<PathBuf>,
    /// Where the report goes, as Markdown with plots beside it.
    #[arg(long, value_name = "FILE", default_value = "target/bench.md")]
    report: PathBuf,
    /// Measure nothing: make the report, and the comparison, of the record that is there.
    #[arg(long)]
    no_run: bool,
    /// The daemon's binary.
    #[arg(long, value_name = "FILE", default_value = "target/release/tunroute")]
    tunroute: PathBuf,
    /// Who takes part, besides the baseline and the floor: names of contestants. All unless told.
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    only: Vec<String>,
    /// The numbers of prefixes.
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    prefixes: Option<Vec<u32>>,
}

fn main() -> ExitCode {
    match bench(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(cli: &Cli) -> Result<ExitCode> {
    let prefixes = cli.prefixes.clone().unwrap_or_else(|| match cli.quick {
        true => vec![1, 1000, 10_000],
        false => vec![1, 10, 100, 1000, 10_000, 100_000, 1_000_000],
    });
    let limits = Limits {
        install: Duration::from_secs(if cli.quick { 3 } else { 15 }),
        packet: Duration::from_micros(if cli.quick { 100 } else { 1000 }),
    };
    let effort = Effort {
        prefixes,
        rounds: if cli.quick { 12 } else { 30 },
        slice: Duration::from_millis(if cli.quick { 8 } else { 12 }),
        limits,
        time: Duration::from_secs(cli.seconds.unwrap_or(if cli.quick { 100 } else { 600 })),
        quick: cli.quick,
    };
    // Read first: a record that cannot be read is better known now than after minutes.
    let old = cli.compare.as_deref().map(Record::read).transpose()?;
    let contestants = contestant::all(&cli.tunroute);
    let described: Vec<_> = contestants.iter().map(|contestant| (contestant.name(), contestant.about())).collect();
    let record = if cli.no_run { Record::read(&cli.output)? } else { run(effort, taking_part(cli, contestants)?)? };
    if !cli.no_run {
        record.write(&cli.output)?;
    }
    println!("{}\n{}", table::tables(&record), goals::table(&record));
    markdown::write(&record, &cli.report, &described)?;
    println!("record: {}\nreport: {}", cli.output.display(), cli.report.display());
    Ok(match old {
        Some(old) => tell(&old, &record),
        None => ExitCode::SUCCESS,
    })
}

/// Those that `--only` names, and those that all others are compared with.
fn taking_part(cli: &Cli, mut contestants: Vec<Box<dyn Contestant>>) -> Result<Vec<Box<dyn Contestant>>> {
    for name in &cli.only {
        ensure!(
            contestants.iter().any(|contestant| contestant.name() == name),
            "there is no contestant {name}; there are {}",
            contestants.iter().map(|contestant| contestant.name()).collect::<Vec<_>>().join(", ")
        );
    }
    if !cli.only.is_empty() {
        contestants.retain(|contestant| {
            let name = contestant.name();
            [contestant::BASELINE, contestant::FLOOR].contains(&name) || cli.only.iter().any(|only| only == name)
        });
    }
    Ok(contestants)
}

fn run(effort: Effort, contestants: Vec<Box<dyn Contestant>>) -> Result<Record> {
    // Everything but the sender stays off the sender's CPU, with the processes that are started.
    pin_to(1).context("the bench needs two CPUs: one that packets are sent on, and one for everything else")?;
    let stages = stages(&effort.prefixes, effort.quick);
    let steps = stages.iter().map(Vec::len).sum::<usize>() as u64;
    let mut bench = Bench {
        generator: Generator::load(LAN_MACS)?,
        contestants,
        effort,
        rng: Rng::with_seed(1),
        progress: Progress::new(steps),
    };
    let mut notes = Vec::new();
    let measurements = stages::run(&mut bench, &stages, &mut notes)?;
    bench.progress.finish();
    let mut record =
        Record { machine: Machine::observe(site::SETTINGS.map(str::to_owned).to_vec(), notes), measurements };
    record.widen();
    Ok(record)
}

/// Tells what has changed.
fn tell(old: &Record, new: &Record) -> ExitCode {
    let (changes, compared) = compare(old, new);
    println!("\n{compared} figures compared with commit {}:", old.machine.commit);
    for Change { verdict, old, new, factor } in &changes {
        let what = match verdict {
            Verdict::Faster => "faster",
            Verdict::Slower => "SLOWER",
            Verdict::Failed => "FAILED",
        };
        let (was, is) = (table::ratio(old), table::ratio(new));
        println!("{what}: {} in {}: {was} → {is}, factor {factor:.2}", new.contestant, table::title(&new.case));
    }
    if changes.is_empty() {
        println!("nothing has changed beyond noise");
    }
    match changes.iter().any(|change| change.verdict != Verdict::Faster) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}
