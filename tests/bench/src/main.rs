//! `cargo xtask bench`

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use fastrand::Rng;
use tunroute_bench::{
    contestant,
    generator::{Generator, pin_to},
    limits::Limits,
    machine::Machine,
    record::Record,
    report::table,
    scenario::{Bench, Effort, Progress, forward},
    site::LAN_MACS,
};

/// What tunroute's fast path saves and costs on this machine, against what one would use instead.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Cli {
    /// Less of everything: under two minutes.
    #[arg(long)]
    quick: bool,
    /// Where the record goes, as lines of JSON.
    #[arg(long, value_name = "FILE", default_value = "target/bench.jsonl")]
    output: PathBuf,
    /// The daemon's binary.
    #[arg(long, value_name = "FILE", default_value = "target/release/tunroute")]
    tunroute: PathBuf,
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
        true => vec![1, 100, 1000, 10_000],
        false => vec![1, 10, 100, 1000, 10_000, 100_000, 1_000_000],
    });
    let limits = Limits {
        install: Duration::from_secs(if cli.quick { 3 } else { 15 }),
        packet: Duration::from_micros(if cli.quick { 100 } else { 500 }),
    };
    let effort = Effort {
        prefixes,
        rounds: if cli.quick { 20 } else { 40 },
        slice: Duration::from_millis(if cli.quick { 8 } else { 12 }),
        limits,
        quick: cli.quick,
    };
    // Everything but the sender stays off the sender's CPU, with the processes that are started.
    pin_to(1)?;
    let stages = forward::stages(&effort.prefixes, cli.quick);
    let steps = stages.iter().map(Vec::len).sum::<usize>() as u64;
    let mut bench = Bench {
        generator: Generator::load(LAN_MACS)?,
        contestants: contestant::all(&cli.tunroute),
        effort,
        rng: Rng::with_seed(1),
        progress: Progress::new(steps),
    };
    let measurements = forward::run(&mut bench, &stages)?;
    bench.progress.finish();
    let record = Record { machine: Machine::observe(Vec::new()), measurements };
    record.write(&cli.output)?;
    println!("{}", table::tables(&record));
    Ok(ExitCode::SUCCESS)
}
