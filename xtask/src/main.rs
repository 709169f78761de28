//! `cargo xtask`: everything a developer or CI does here, by one name on every machine.

mod bench;
mod build;
mod command;
mod debian;
mod dist;
mod documents;
mod fuzz;
mod lint;
mod run;
mod setup;
mod tally;
mod test;
mod vm;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

/// The tasks of a tunroute developer. Each installs what it needs when that is missing.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing needs, where it is missing
    Setup,
    /// Build and start the demo; or, with arguments, `tunroute run` with them
    Run {
        /// Arguments for `tunroute run`
        #[arg(last = true)]
        args: Vec<OsString>,
    },
    /// Build, and run every test: unit tests, and the integration tests in network namespaces
    Test(test::Options),
    /// Build, and measure what the fast path saves and costs on this machine (`cargo xtask bench --help`)
    Bench {
        /// Arguments for the bench
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Build a stripped binary and a Debian package, in target/dist
    Dist,
    /// Check formatting, clippy's lints for the host and for eBPF, and documents
    Lint {
        /// Write generated pages anew
        #[arg(long)]
        fix: bool,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Setup => setup::everything(),
        Task::Run { args } => run::run(&args),
        Task::Test(options) => options.run(),
        Task::Bench { args } => bench::bench(&args),
        Task::Dist => dist::dist().map(drop),
        Task::Lint { fix } => lint::lint(fix),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::say(format_args!("failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
