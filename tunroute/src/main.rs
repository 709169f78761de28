//! The `tunroute` command.

use std::{
    io::{self, IsTerminal, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Parser as _;
use tokio::sync::oneshot;
use tunroute::{
    commands::cli::{AttachArg, Cli, Command, Plan, Run},
    commands::doctor::{self, Observation, examine},
    commands::import,
    commands::top,
    commands::trace::Wanted,
    config::{Config, ConfigError, Loaded},
    control::socket::{Answer, ControlError, OTHER_ANSWER, Request, TrialTime, ask},
    daemon::{self, Options, down_without_daemon, preview_without_daemon},
    datapath::Method,
    host::instance::InstanceError,
    host::log,
    host::privilege,
    host::state::StateError,
};

/// `EX_NOPERM` of `sysexits.h`: the caller may not do this.
const NO_PERMISSION: u8 = 77;

/// The exit status of `plan` with changes, and of `doctor` with findings.
const CHANGES: u8 = 2;

/// The default path of the configuration.
const DEFAULT_CONFIG: &str = "/etc/tunroute/tunroute.toml";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    match runtime.block_on(dispatch(cli.command)) {
        Ok(code) => code,
        Err(error) => {
            let code = fail(&format!("{error:#}"));
            if is_forbidden(&error) { ExitCode::from(NO_PERMISSION) } else { code }
        }
    }
}

/// Whether it failed for lack of permission.
fn is_forbidden(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let system = cause.downcast_ref::<io::Error>();
        system.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
            || matches!(cause.downcast_ref(), Some(ControlError::Forbidden { .. }))
    })
}

fn fail(message: &str) -> ExitCode {
    log::complain(&format!("tunroute: {message}"));
    ExitCode::FAILURE
}

/// Prints to standard output. A closed pipe is not an error.
fn print(text: &str) {
    let _closed = io::stdout().write_all(text.as_bytes());
}

async fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(arguments) => run(arguments).await,
        Command::Check { file, json } => check(&file, json),
        Command::Doctor { file, fix, json } => doctor(&file, fix, json).await,
        Command::Import { from_script } => import(&from_script),
        Command::Status { runtime, json, watch } => status(&runtime.runtime_dir, json, watch).await,
        Command::Top { runtime, interval } => {
            let paint = top::Paint { colour: colour(&io::stdout()) };
            top::top(runtime.runtime_dir, Duration::from_secs(interval), paint).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Plan(arguments) => plan(arguments).await,
        Command::Explain { source, destination, iif, runtime, json } => {
            compared(ask(&runtime.runtime_dir, Request::Explain { source, destination, iif }).await, json)
        }
        Command::Verify { samples, runtime, json } => {
            compared(ask(&runtime.runtime_dir, Request::Verify { samples }).await, json)
        }
        Command::Trace { from, to, rate, runtime, json } => {
            trace(&runtime.runtime_dir, Wanted { from, to, rate }, json).await
        }
        Command::Reload { runtime } => done(ask(&runtime.runtime_dir, Request::Reload).await?),
        Command::Apply { runtime, confirm: None } => done(ask(&runtime.runtime_dir, Request::Reload).await?),
        Command::Apply { runtime, confirm: Some(time) } => apply_on_trial(&runtime.runtime_dir, time).await,
        Command::Confirm { runtime } => done(ask(&runtime.runtime_dir, Request::Confirm).await?),
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

/// Whether to use colours: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
fn colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Prints a comparison of the datapaths. The exit status is that of `diff`: 0 for agreement, 1 for a difference, 2 for a
/// failure; but 77 without permission, as for every command.
fn compared(answer: Result<Answer, ControlError>, json: bool) -> anyhow::Result<ExitCode> {
    let colour = colour(&io::stdout());
    let (text, value, agree) = match answer {
        Ok(Answer::Explanation(explanation)) => {
            (explanation.render(colour), serde_json::to_value(&explanation), explanation.agree)
        }
        Ok(Answer::Verified(verification)) => {
            (verification.render(colour), serde_json::to_value(&verification), verification.agree())
        }
        Ok(Answer::Failed(reason)) => return Ok(trouble(&reason)),
        Ok(_) => return Ok(trouble(OTHER_ANSWER)),
        Err(error @ ControlError::Forbidden { .. }) => return Err(error.into()),
        Err(error) => return Ok(trouble(&format!("{:#}", anyhow::Error::from(error)))),
    };
    match value {
        Ok(value) => print(&if json { format!("{value:#}\n") } else { text }),
        Err(error) => return Ok(trouble(&error.to_string())),
    }
    Ok(ExitCode::from(u8::from(!agree)))
}

fn trouble(message: &str) -> ExitCode {
    fail(message);
    ExitCode::from(2)
}

/// Loads a configuration, or prints its errors.
fn load(file: &Path) -> Option<Config> {
    match Config::load(file) {
        Ok(config) => Some(config),
        Err(error) => {
            log::complain(&error.render(colour(&io::stderr())).to_string());
            None
        }
    }
}

/// `1 policy`, `2 policies`
fn count(number: usize, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

fn check(file: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let loaded = Loaded::load(file);
    let code = if loaded.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if json {
        let (good, omitted) = (loaded.is_ok(), loaded.as_ref().map_or_else(ConfigError::omitted, |_| 0));
        let problems = loaded.as_ref().map_or_else(ConfigError::problems, |loaded| &loaded.warnings);
        let value = serde_json::json!({ "good": good, "problems": problems, "omitted": omitted });
        print(&format!("{value:#}\n"));
        return Ok(code);
    }
    let colour = colour(&io::stderr());
    match loaded {
        Err(error) => log::complain(&error.render(colour)),
        Ok(Loaded { config, warnings }) => {
            warnings.iter().for_each(|warning| log::complain(&warning.render(colour)));
            let prefixes = config.policies.iter().map(|policy| policy.from.len()).sum();
            let warned = if warnings.is_empty() {
                String::new()
            } else {
                format!("; {}", count(warnings.len(), "warning", "warnings"))
            };
            let followed = match config.policies.iter().map(|policy| policy.follow.len()).sum() {
                0 => String::new(),
                interfaces => format!(" and those of {}", count(interfaces, "interface", "interfaces")),
            };
            print(&format!(
                "{}: good: {}, {}, {}{followed}{warned}\n",
                file.display(),
                count(config.tunnels.len(), "tunnel", "tunnels"),
                count(config.policies.len(), "policy", "policies"),
                count(prefixes, "prefix", "prefixes"),
            ));
        }
    }
    Ok(code)
}

async fn doctor(file: &Path, fix: bool, json: bool) -> anyhow::Result<ExitCode> {
    let Some(config) = load(file) else { return Ok(ExitCode::FAILURE) };
    let mut findings = examine(&config, &Observation::take(&config).await?);
    let mut mended = Vec::new();
    if fix {
        for setting in findings.iter().filter_map(|finding| finding.setting.clone()) {
            setting.apply().with_context(|| format!("cannot set {setting}"))?;
            mended.push(setting);
        }
        findings = examine(&config, &Observation::take(&config).await?);
    }
    if json {
        let mended: Vec<String> = mended.iter().map(ToString::to_string).collect();
        print(&format!("{:#}\n", serde_json::json!({ "findings": findings, "mended": mended })));
    } else {
        let colour = colour(&io::stdout());
        print(&doctor::report(&findings, &mended, colour));
    }
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(CHANGES) })
}

fn import(files: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let setup = if files.is_empty() {
        import::live()?
    } else {
        // Comments in scripts need not be UTF-8.
        let read = |path: &Path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let named = |path: &PathBuf| {
            let text = read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Ok((path.to_string_lossy().into_owned(), text))
        };
        let texts: Vec<(String, String)> = files.iter().map(named).collect::<anyhow::Result<_>>()?;
        let files: Vec<import::File<'_>> = texts.iter().map(|(path, text)| import::File { path, text }).collect();
        import::parse(&files, import::table_names(), &|path| read(Path::new(path)).ok())
    };
    let draft = import::draft(&setup);
    let (policies, prefixes) = draft.counts();
    if draft.is_empty() {
        draft.notes().iter().for_each(|note| log::complain(&format!("  {note}")));
        anyhow::bail!("no rule sends a source prefix to a table with a default route: there is nothing to import");
    }
    print(&draft.write());
    let left = match draft.notes().len() {
        0 => String::new(),
        notes => format!("; {} not expressed: see the end of the file", count(notes, "thing is", "things are")),
    };
    let (policies, prefixes) = (count(policies, "policy", "policies"), count(prefixes, "prefix", "prefixes"));
    log::complain(&format!("tunroute: {policies} with {prefixes}{left}"));
    Ok(ExitCode::SUCCESS)
}

/// Moves the cursor home and clears below, so that unchanged cells do not flicker.
const CLEAR: &str = "\x1b[H\x1b[J";

async fn status(runtime_dir: &Path, json: bool, watch: Option<u64>) -> anyhow::Result<ExitCode> {
    loop {
        let status = match ask(runtime_dir, Request::Status).await? {
            Answer::Status(status) => status,
            answer => return done(answer),
        };
        if json && watch.is_some() {
            // One object on each line.
            print(&(serde_json::to_string(&status)? + "\n"));
        } else if json {
            print(&(serde_json::to_string_pretty(&status)? + "\n"));
        } else if watch.is_some() && io::stdout().is_terminal() {
            print(&format!("{CLEAR}{}", status.render()));
        } else {
            print(&status.render());
        }
        match watch {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// The time between two requests. A trace session of the daemon lasts longer without one.
const LOOK: Duration = Duration::from_millis(100);

async fn trace(runtime_dir: &Path, wanted: Wanted, json: bool) -> anyhow::Result<ExitCode> {
    // A number of this session alone: two listeners must not take each other's decisions.
    let session = fastrand::u64(..);
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        let traced = match ask(runtime_dir, Request::Trace { session, wanted }).await? {
            Answer::Traced(traced) => traced,
            answer => return done(answer),
        };
        let mut text = String::new();
        for decision in &traced.decisions {
            text += &if json { decision.json().to_string() } else { decision.render() };
            text.push('\n');
        }
        if traced.omitted > 0 {
            let omitted = traced.omitted;
            text += &if json {
                serde_json::json!({ "omitted": omitted }).to_string()
            } else {
                format!(
                    "… and {} more, which are too many to show (--rate)",
                    count(usize::try_from(omitted).unwrap_or(usize::MAX), "packet", "packets")
                )
            };
            text.push('\n');
        }
        // The reader has closed the pipe.
        if io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()).is_err() {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::select! {
            _ = &mut interrupted => return Ok(ExitCode::SUCCESS),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

async fn plan(arguments: Plan) -> anyhow::Result<ExitCode> {
    // The daemon has another working directory.
    let file = arguments.file.map(std::path::absolute).transpose()?;
    let preview = match ask(&arguments.runtime.runtime_dir, Request::Plan { file: file.clone() }).await {
        Ok(Answer::Plan(preview)) => preview,
        Ok(answer) => return done(answer),
        Err(ControlError::NoDaemon { .. }) => {
            if let Err(missing) = privilege::check() {
                log::complain(&format!("tunroute: {missing}"));
                return Ok(ExitCode::from(NO_PERMISSION));
            }
            let file = file.unwrap_or_else(|| DEFAULT_CONFIG.into());
            let Some(config) = load(&file) else { return Ok(ExitCode::FAILURE) };
            preview_without_daemon(&file, config, &arguments.directories.into()).await?
        }
        Err(error) => return Err(error.into()),
    };
    print(&if arguments.json {
        serde_json::to_string_pretty(&preview)? + "\n"
    } else {
        preview.render(colour(&io::stdout()))
    });
    Ok(if preview.steps.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(CHANGES) })
}

async fn apply_on_trial(runtime_dir: &Path, time: TrialTime) -> anyhow::Result<ExitCode> {
    let seconds = u64::from(time);
    match ask(runtime_dir, Request::Apply { seconds: time }).await? {
        Answer::Done => {}
        answer => return done(answer),
    }
    if !io::stdin().is_terminal() {
        print(&format!("applied; run `tunroute confirm` within {seconds} s to keep it\n"));
        return Ok(ExitCode::SUCCESS);
    }
    print(&format!("applied; press Enter within {seconds} s to keep it: "));
    let (enter, entered) = oneshot::channel();
    // A detached thread: a blocking task of the runtime would keep the program from ending.
    std::thread::spawn(move || {
        let mut line = String::new();
        if io::stdin().read_line(&mut line).is_ok_and(|length| length > 0) {
            let _too_late = enter.send(());
        }
    });
    match tokio::time::timeout(time.into(), entered).await {
        Ok(Ok(())) => {
            let code = done(ask(runtime_dir, Request::Confirm).await?)?;
            print("confirmed\n");
            Ok(code)
        }
        Ok(Err(_)) | Err(_) => anyhow::bail!("not confirmed: the earlier configuration comes back"),
    }
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
        instance: arguments.directories.into(),
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

/// How long `down` waits for a daemon that has its locks and does not listen: it starts, or ends.
const STARTING: Duration = Duration::from_secs(10);

async fn down(runtime_dir: &Path) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + STARTING;
    loop {
        match ask(runtime_dir, Request::Down).await {
            Err(ControlError::NoDaemon { .. }) => {}
            answer => return done(answer?),
        }
        if let Err(missing) = privilege::check() {
            log::complain(&format!("tunroute: {missing}"));
            return Ok(ExitCode::from(NO_PERMISSION));
        }
        match down_without_daemon(runtime_dir).await {
            Ok(true) => return Ok(ExitCode::SUCCESS),
            Ok(false) => {
                print("nothing to do: no daemon is running, and there is nothing to remove\n");
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) if is_locked(&error) && Instant::now() < deadline => tokio::time::sleep(LOOK).await,
            Err(error) => return Err(error),
        }
    }
}

/// A daemon has what is asked for.
fn is_locked(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(StateError::InUse { .. }))
        || matches!(error.downcast_ref(), Some(InstanceError::NamespaceTaken | InstanceError::InUse { .. }))
}
