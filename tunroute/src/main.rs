//! The `tunroute` command.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use clap::Parser as _;
use tunroute::{
    cli::{AttachArg, Cli, Command, Run},
    config::Config,
    control::{Answer, ControlError, Request, ask},
    daemon::{self, Options, down_without_daemon},
    datapath::Method,
    instance::Instance,
    log, privilege,
};

/// `EX_NOPERM` of `sysexits.h`: the caller may not do this.
const NO_PERMISSION: u8 = 77;
/// What an older or newer daemon may do.
const OTHER_ANSWER: &str = "the daemon gave another answer than asked for; is it of another version?";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    match runtime.block_on(dispatch(cli.command)) {
        Ok(code) => code,
        Err(error) => {
            let forbidden = matches!(
                error.downcast_ref(),
                Some(ControlError::Connect { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied
            );
            let code = fail(&format!("{error:#}"));
            if forbidden { ExitCode::from(NO_PERMISSION) } else { code }
        }
    }
}

fn fail(message: &str) -> ExitCode {
    log::complain(&format!("tunroute: {message}"));
    ExitCode::FAILURE
}

/// Prints to standard output; a reader that has gone away is not an error.
fn print(text: &str) {
    let _closed = io::stdout().write_all(text.as_bytes());
}

async fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(arguments) => run(arguments).await,
        Command::Check { file } => Ok(check(&file)),
        Command::Status { runtime, json } => match ask(&runtime.runtime_dir, Request::Status).await? {
            Answer::Status(status) => {
                print(&if json { serde_json::to_string_pretty(&status)? + "\n" } else { status.render() });
                Ok(ExitCode::SUCCESS)
            }
            answer => done(answer),
        },
        Command::Explain { source, destination, iif, runtime, json } => {
            Ok(compared(ask(&runtime.runtime_dir, Request::Explain { source, destination, iif }).await, json))
        }
        Command::Verify { samples, runtime, json } => {
            Ok(compared(ask(&runtime.runtime_dir, Request::Verify { samples }).await, json))
        }
        Command::Reload { runtime } => done(ask(&runtime.runtime_dir, Request::Reload).await?),
        Command::Start { tunnel, runtime } => done(ask(&runtime.runtime_dir, Request::Start { tunnel }).await?),
        Command::Down { runtime } => down(&runtime.runtime_dir).await,
    }
}

fn done(answer: Answer) -> anyhow::Result<ExitCode> {
    match answer {
        Answer::Done => Ok(ExitCode::SUCCESS),
        Answer::Failed(reason) => anyhow::bail!("{reason}"),
        _ => anyhow::bail!("{OTHER_ANSWER}"),
    }
}

/// Prints what both datapaths say, with the exit status of `diff`: 0 for the same, 1 for a difference, 2 for trouble.
fn compared(answer: Result<Answer, ControlError>, json: bool) -> ExitCode {
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (text, value, agree) = match answer {
        Ok(Answer::Explanation(explanation)) => {
            (explanation.render(colour), serde_json::to_value(&explanation), explanation.agree != Some(false))
        }
        Ok(Answer::Verified(verification)) => {
            (verification.render(colour), serde_json::to_value(&verification), verification.agree())
        }
        Ok(Answer::Failed(reason)) => return trouble(&reason),
        Ok(_) => return trouble(OTHER_ANSWER),
        Err(error) => return trouble(&error.to_string()),
    };
    match value {
        Ok(value) => print(&if json { format!("{value:#}\n") } else { text }),
        Err(error) => return trouble(&error.to_string()),
    }
    ExitCode::from(u8::from(!agree))
}

fn trouble(message: &str) -> ExitCode {
    fail(message);
    ExitCode::from(2)
}

/// Reads a configuration; shows all that is wrong with it.
fn load(file: &Path) -> Option<Config> {
    match Config::load(file) {
        Ok(config) => Some(config),
        Err(error) => {
            let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            log::complain(&error.render(colour).to_string());
            None
        }
    }
}

fn check(file: &Path) -> ExitCode {
    let Some(config) = load(file) else { return ExitCode::FAILURE };
    let (tunnels, policies) = (config.tunnels.len(), config.policies.len());
    let prefixes: usize = config.policies.iter().map(|policy| policy.from.len()).sum();
    print(&format!("{}: good: {tunnels} tunnels, {policies} policies, {prefixes} prefixes\n", file.display()));
    ExitCode::SUCCESS
}

async fn run(arguments: Run) -> anyhow::Result<ExitCode> {
    if let Err(missing) = privilege::check() {
        log::complain(&format!("tunroute: {missing}"));
        return Ok(ExitCode::from(NO_PERMISSION));
    }
    let Some(config) = load(&arguments.config) else { return Ok(ExitCode::FAILURE) };
    log::init();
    let options = Options {
        config: arguments.config,
        runtime_dir: arguments.runtime.runtime_dir,
        instance: Instance {
            state_dir: arguments.state_dir,
            pin_dir: arguments.pin_dir,
            rt_tables_dir: arguments.rt_tables_dir,
        },
        datapath: arguments.datapath.map(Into::into),
        method: arguments.attach.map(|attach| match attach {
            AttachArg::Tcx => Method::Tcx,
            AttachArg::Clsact => Method::Clsact,
        }),
        down_on_exit: arguments.down_on_exit,
    };
    daemon::run(options, config).await?;
    Ok(ExitCode::SUCCESS)
}

async fn down(runtime_dir: &Path) -> anyhow::Result<ExitCode> {
    match ask(runtime_dir, Request::Down).await {
        Err(ControlError::NoDaemon { .. }) => {}
        answer => return done(answer?),
    }
    if let Err(missing) = privilege::check() {
        log::complain(&format!("tunroute: {missing}"));
        return Ok(ExitCode::from(NO_PERMISSION));
    }
    if !down_without_daemon(runtime_dir).await? {
        print("nothing to do: no daemon runs, and none has left anything\n");
    }
    Ok(ExitCode::SUCCESS)
}
