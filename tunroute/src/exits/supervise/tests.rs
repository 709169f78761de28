//! Supervision with real processes.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use super::{machine::Phase, *};

const LIMIT: StartLimit = StartLimit { burst: 4, interval: Duration::from_secs(60) };
/// How long is waited for what must come, on a busy machine too.
const SOON: Duration = Duration::from_secs(60);

fn tunnel(up: &[&str]) -> Tunnel {
    Tunnel {
        name: "tun0".to_owned(),
        table: None,
        via_v4: None,
        via_v6: None,
        up: Some(up.iter().map(ToString::to_string).collect()),
        down: None,
        start_limit: LIMIT,
        mss: None,
        probes: Vec::new(),
    }
}

/// A shell script as a command; the tests' own files are its arguments.
fn script(text: &str, file: &Path) -> Tunnel {
    tunnel(&["/bin/sh", "-c", text, "up", file.to_str().unwrap()])
}

struct Daemon {
    supervisor: Supervisor,
    state: Arc<StateDir>,
}

impl Daemon {
    /// A daemon starts; the last one on this directory may just have died.
    async fn start(path: &Path, tunnel: &Tunnel) -> Self {
        let deadline = Instant::now() + SOON;
        let state = loop {
            match StateDir::open(path) {
                Ok(state) => break Arc::new(state),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let mut supervisor = Supervisor::new(Arc::clone(&state));
        supervisor.reconfigure(std::slice::from_ref(tunnel));
        Self { supervisor, state }
    }

    fn device(&self, up: bool) {
        self.supervisor.device_up("tun0", up);
    }

    fn status(&self) -> Status {
        self.supervisor.status().remove("tun0").expect("tun0 is supervised")
    }

    async fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        eventually(what, || Some(self.status()).filter(&condition)).await
    }
}

async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {SOON:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn dir() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state");
    (root, path)
}

fn lines(file: &Path) -> usize {
    std::fs::read_to_string(file).unwrap_or_default().lines().count()
}

#[tokio::test]
async fn a_starter_is_started_once() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let daemon = Daemon::start(&path, &script("echo start >> $1", &file)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((daemon.status().state, lines(&file)), (Phase::Idle, 0), "the device was not looked at yet");
    daemon.device(false);
    let status = daemon.until("started", |status| status.state == Phase::Started).await;
    assert_eq!(status.last_exit.as_deref(), Some("exit status: 0"));
    assert_eq!((status.starts_in_window, status.pid, lines(&file)), (1, None, 1));
    assert!(status.next_start.is_some(), "the device may stay away");
    daemon.device(true);
    daemon.until("no start is due", |status| status.next_start.is_none()).await;
}

#[tokio::test]
async fn a_device_that_is_up_is_not_started() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let mut daemon = Daemon::start(&path, &script("echo start >> $1", &file)).await;
    daemon.device(true);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((daemon.status().state, lines(&file)), (Phase::Idle, 0));
    daemon.supervisor.stop().await;
    assert!(daemon.supervisor.status().is_empty());
}

#[tokio::test]
async fn failures_are_told_and_repeated() {
    let cases: [(&[&str], &str); 4] = [
        (&["/bin/false"], "exit status: 1"),
        (&["/bin/sh", "-c", "kill -9 $$"], "signal: 9 (SIGKILL)"),
        (&["/nonexistent/up"], "cannot be run: No such file or directory (os error 2)"),
        (&["/proc/version"], "cannot be run: Permission denied (os error 13)"),
    ];
    for (up, text) in cases {
        let (_root, path) = dir();
        let daemon = Daemon::start(&path, &tunnel(up)).await;
        daemon.device(false);
        let status = daemon.until("backoff", |status| status.state == Phase::Backoff).await;
        assert_eq!(status.last_exit.as_deref(), Some(text));
        // Whoever looks late sees a later pause, which is twice as long.
        let pause = status.next_start.unwrap().since(BootTime::now());
        let longest = Duration::from_millis(1250 << (status.starts_in_window - 1));
        assert!(pause <= longest, "{pause:?} after {} starts", status.starts_in_window);
        daemon.until("a second start", |status| status.starts_in_window >= 2).await;
    }
}

#[tokio::test]
async fn the_limit_holds_across_daemons_and_gives_up() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let mut tunnel = script("date +%s%N >> $1; exit 1", &file);
    tunnel.start_limit = StartLimit { burst: 1, interval: Duration::from_secs(6) };

    let daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    daemon.until("limited", |status| status.state == Phase::Limited).await;
    drop(daemon);
    let daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    // The operator is impatient; the limit is not.
    daemon.supervisor.reset("tun0");
    daemon.until("limited still", |status| status.state == Phase::Limited).await;
    assert_eq!(lines(&file), 1);
    daemon.until("given up", |status| status.state == Phase::GivenUp).await;
    drop(daemon);

    let times: Vec<u64> = std::fs::read_to_string(&file).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert!(times.len() >= 2, "{times:?}");
    // The script may come to look at the clock only some time after its start: without the limit it is 1 s, at most.
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 3_000_000_000), "{times:?}");

    let daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    daemon.until("given up by an earlier daemon", |status| status.state == Phase::GivenUp).await;
    assert!(daemon.supervisor.reset("tun0"));
    assert!(!daemon.supervisor.reset("tun1"));
    daemon.until("the operator has spoken", |status| status.state != Phase::GivenUp).await;
    eventually("started again", || Some(()).filter(|()| lines(&file) > times.len())).await;
}

#[tokio::test]
async fn a_damaged_record_means_a_pause() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let mut tunnel = script("echo start >> $1", &file);
    tunnel.start_limit.interval = Duration::from_secs(5);
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("starts-tun0.json"), "{\"boot\": ").unwrap();
    let daemon = Daemon::start(&path, &tunnel).await;
    let begun = Instant::now();
    daemon.device(false);
    daemon.until("limited", |status| status.state == Phase::Limited).await;
    assert_eq!(lines(&file), 0);
    daemon.until("started", |status| status.state == Phase::Started).await;
    assert!(begun.elapsed() >= Duration::from_millis(4900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_disk_that_refuses_the_record_means_a_pause() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let mut tunnel = script("echo start >> $1", &file);
    tunnel.start_limit.interval = Duration::from_secs(5);
    // The temporary file cannot be made.
    std::fs::create_dir_all(path.join(".starts-tun0.json.new")).unwrap();
    let daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    daemon.until("limited", |status| status.state == Phase::Limited).await;
    daemon.until("started", |status| status.state == Phase::Started).await;
    assert_eq!(lines(&file), 1);
}

/// A foreground tunnel that talks; it notes each start, and what is sent to its children.
const FOREGROUND: &str = r#"
    echo start >> "$1"
    i=0
    while [ $i -lt 2400 ]; do echo "line $i"; i=$((i + 1)); echo $i > "$1.alive"; sleep 0.05; done
"#;

#[tokio::test]
async fn a_foreground_command_outlives_the_daemon_and_is_found_again() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let tunnel = script(FOREGROUND, &file);
    // A runtime of its own: with it go all tasks, also the one that reads the output.
    let first = std::thread::scope(|scope| {
        let daemon = async {
            let daemon = Daemon::start(&path, &tunnel).await;
            daemon.device(false);
            daemon.until("running", |status| status.pid.is_some()).await
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        scope.spawn(move || runtime.block_on(daemon)).join().unwrap()
    });
    assert_eq!(first.state, Phase::Running);

    // It writes on, with nobody to read.
    let alive = || std::fs::read_to_string(root.path().join("starts.alive")).ok()?.trim().parse::<u64>().ok();
    let then = eventually("it lives", alive).await;
    eventually("it lives on", || alive().filter(|now| *now > then + 5)).await;

    let mut daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    let second = daemon.until("found again", |status| status.state == Phase::Running).await;
    assert_eq!((second.pid, lines(&file)), (first.pid, 1));

    let record: record::Record = daemon.state.load("starts-tun0.json").unwrap().unwrap();
    let process = record.process.unwrap();
    assert!(process.output().is_some(), "its output can be read again");
    daemon.supervisor.stop().await;
    assert!(!process.runs());
    let stopped: record::Record = daemon.state.load("starts-tun0.json").unwrap().unwrap();
    assert_eq!((stopped.ours, stopped.process), (false, None));
}

#[tokio::test]
async fn a_found_command_that_ends_is_started_again_when_the_device_stays_away() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let tunnel = script(FOREGROUND, &file);
    let daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    let pid = daemon.until("running", |status| status.pid.is_some()).await.pid.unwrap();
    drop(daemon);
    let daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    daemon.until("found again", |status| status.state == Phase::Running).await;
    nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = daemon.until("its end is seen", |status| status.state == Phase::Started).await;
    assert_eq!(status.pid, None);
    assert!(status.next_start.is_some());
}

#[tokio::test]
async fn stop_runs_down_and_then_ends_the_whole_group() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    // Neither the command nor its child heeds SIGTERM.
    let mut tunnel = script("trap '' TERM; echo start >> $1; sleep 60 & echo $! > $1.child; wait; sleep 60", &file);
    tunnel.down = Some(vec![
        "/bin/sh".into(),
        "-c".into(),
        "echo down >> $1".into(),
        "down".into(),
        file.to_str().unwrap().into(),
    ]);
    let mut daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    let child = eventually("a child", || {
        std::fs::read_to_string(root.path().join("starts.child")).ok()?.trim().parse::<i32>().ok()
    });
    let child = child.await;
    let begun = Instant::now();
    daemon.supervisor.stop().await;
    assert!(begun.elapsed() < STOP_TIME);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "start\ndown\n");
    let gone = || {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        Some(()).filter(|()| stat.is_empty() || stat.contains(") Z "))
    };
    eventually("the child is gone", gone).await;
}

#[tokio::test]
async fn a_tunnel_taken_out_of_the_configuration_is_taken_down() {
    let (root, path) = dir();
    let file = root.path().join("starts");
    let mut tunnel = script("echo up >> $1", &file);
    tunnel.down = Some(vec![
        "/bin/sh".into(),
        "-c".into(),
        "sleep 0.2; echo down >> $1".into(),
        "down".into(),
        file.to_str().unwrap().into(),
    ]);
    let mut daemon = Daemon::start(&path, &tunnel).await;
    daemon.device(false);
    daemon.until("started", |status| status.state == Phase::Started).await;
    daemon.supervisor.reconfigure(&[]);
    // Back again before it is down.
    daemon.supervisor.reconfigure(std::slice::from_ref(&tunnel));
    daemon.device(false);
    daemon.supervisor.reset("tun0");
    eventually("up, down, up", || Some(()).filter(|()| lines(&file) == 3)).await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "up\ndown\nup\n");
}
