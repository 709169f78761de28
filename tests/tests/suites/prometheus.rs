//! The metrics as Prometheus sees them: its own check, a server that scrapes the daemon, and the dashboard's questions.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, Netns, TUNNELS, TunnelKind, World, pace::patience, ping, plan::REMOTE, traffic::Answer,
};

const DAEMON: &str = "127.0.0.1:9942";
const SERVER: &str = "127.0.0.1:9090";
/// A server that starts, and a rate that takes some scrapes.
const SOON: Duration = Duration::from_secs(120);
const DASHBOARD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tunroute/dashboard/grafana.json");
/// What Grafana writes in place of its variables, here.
const VARIABLES: [(&str, &str); 5] =
    [("$__rate_interval", "30s"), ("$__range", "5m"), ("$instance", ".*"), ("$policy", ".*"), ("$tunnel", ".*")];

/// Where `cargo xtask test` has unpacked Debian's package.
fn program(name: &str) -> Result<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/prometheus/usr/bin");
    let path = env::var_os("TUNROUTE_PROMETHEUS").map_or(unpacked, PathBuf::from).join(name);
    ensure!(path.is_file(), "there is no {}: `cargo xtask setup` unpacks it", path.display());
    Ok(path)
}

/// The body of the answer to `GET PATH`.
fn get(host: &Netns, address: &str, path: &str) -> Result<String> {
    host.run_in(|| {
        let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        // The older version of HTTP, in which an answer ends with the connection.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
        ensure!(head.lines().next().is_some_and(|line| line.contains(" 200 ")), "{path}: {answer}");
        Ok(body.to_owned())
    })
}

/// A server that scrapes the daemon. Dropping it kills it.
struct Prometheus<'a> {
    host: &'a Netns,
    child: Child,
    log: PathBuf,
}

impl<'a> Prometheus<'a> {
    fn start(world: &'a World) -> Result<Self> {
        let dir = world.dir().join("prometheus");
        fs::create_dir(&dir)?;
        let config = dir.join("prometheus.yml");
        fs::write(
            &config,
            format!(
                "global: {{ scrape_interval: 500ms, scrape_timeout: 500ms }}\n\
                 scrape_configs: [{{ job_name: tunroute, static_configs: [{{ targets: [\"{DAEMON}\"] }}] }}]\n"
            ),
        )?;
        let log = dir.join("log");
        let mut server = world.host.command(program("prometheus")?);
        server.arg("--config.file").arg(&config).arg("--storage.tsdb.path").arg(dir.join("data"));
        server.args(["--web.listen-address", SERVER]);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?);
        Ok(Self { host: &world.host, child: server.spawn().context("cannot start Prometheus")?, log })
    }

    /// The series that a question gives now, each with its labels and value.
    fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let query: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer: Value = serde_json::from_str(&get(self.host, SERVER, &format!("/api/v1/query?query={query}"))?)?;
        ensure!(answer["status"] == "success", "{expression}: {answer}");
        answer["data"]["result"].as_array().cloned().with_context(|| format!("{expression}: {answer}"))
    }

    /// Waits for an answer.
    fn wait<T>(&self, what: &str, ask: impl Fn() -> Result<Option<T>>) -> Result<T> {
        let deadline = Instant::now() + patience(SOON);
        loop {
            let answer = ask();
            if let Ok(Some(answer)) = answer {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                answer.context(what.to_owned())?;
                anyhow::bail!("no answer in {SOON:?}: {what}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The value of a series.
fn number(series: &Value) -> Option<f64> {
    series["value"][1].as_str()?.parse().ok()
}

/// A question of the dashboard, and the labels by which it calls the answers.
struct Question {
    expression: String,
    labels: Vec<String>,
}

/// All panels' questions. Everything that a dashboard must have to be loaded and look right is looked at.
fn dashboard() -> Result<Vec<Question>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(DASHBOARD)?)?;
    ensure!(dashboard["title"].is_string() && dashboard["uid"].is_string() && dashboard["schemaVersion"].is_u64());
    let declared: BTreeSet<&str> = dashboard["templating"]["list"]
        .as_array()
        .context("no variables")?
        .iter()
        .filter_map(|v| v["name"].as_str())
        .collect();
    let source = serde_json::json!({ "type": "prometheus", "uid": "${datasource}" });
    ensure!(declared.contains("datasource"));
    let (mut ids, mut cells, mut questions) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for panel in dashboard["panels"].as_array().context("no panels")? {
        ensure!(ids.insert(panel["id"].as_u64().context("no id")?), "an id twice: {panel}");
        ensure!(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "no title: {panel}");
        let at = |key: &str| panel["gridPos"][key].as_u64().with_context(|| format!("no {key}: {panel}"));
        let (x, y, width, height) = (at("x")?, at("y")?, at("w")?, at("h")?);
        ensure!(x + width <= 24, "beyond the right edge: {panel}");
        for cell in (x..x + width).flat_map(|x| (y..y + height).map(move |y| (x, y))) {
            ensure!(cells.insert(cell), "over another: {panel}");
        }
        if panel["type"] == "row" {
            continue;
        }
        ensure!(panel["datasource"] == source, "{panel}");
        for target in panel["targets"].as_array().context("no targets")? {
            ensure!(target["refId"].is_string() && target["datasource"] == source, "{target}");
            let mut expression = target["expr"].as_str().context("no question")?.to_owned();
            for (variable, value) in VARIABLES {
                let name = variable.trim_start_matches('$');
                ensure!(name.starts_with("__") || declared.contains(name), "{variable} is not declared");
                expression = expression.replace(variable, value);
            }
            ensure!(!expression.contains('$'), "an unknown variable in {expression}");
            let legend = target["legendFormat"].as_str().context("no legend")?;
            let labels = legend.split("{{").skip(1).filter_map(|rest| Some(rest.split_once("}}")?.0.to_owned()));
            questions.push(Question { expression, labels: labels.collect() });
        }
    }
    Ok(questions)
}

#[test]
fn a_real_prometheus_reads_the_metrics_and_answers_the_dashboard() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let probe = format!("probe = {{ target = \"{}\", interval = \"100ms\" }}\n", TUNNELS[0].gateway.v6);
    let config = world.config().replacen("[tunnel.sixxs0]\n", &format!("[tunnel.sixxs0]\n{probe}"), 1);
    let config = format!("metrics = \"{DAEMON}\"\n{config}");
    let daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;

    // Its own check finds nothing to say about a scrape.
    let scrape = world.dir().join("scrape");
    fs::write(&scrape, get(&world.host, DAEMON, "/metrics")?)?;
    let mut promtool = std::process::Command::new(program("promtool")?);
    let checked = promtool.args(["check", "metrics"]).stdin(fs::File::open(&scrape)?).output()?;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned() + &String::from_utf8_lossy(&checked.stderr);
    ensure!(checked.status.success() && said.is_empty(), "promtool: {said}\n{}", fs::read_to_string(&scrape)?);

    let prometheus = Prometheus::start(&world)?;
    let up = || Ok(prometheus.query("up")?.first().and_then(number).filter(|up| *up > 0.5));
    prometheus.wait("a scrape", up)?;
    // Packets, and passes of the reconciler.
    for _ in 0..5 {
        let answer = ping(&world.client, TUNNELS[0].client.of(Family::V6), REMOTE.of(Family::V6))?;
        assert_eq!(answer, Answer::Reply);
    }
    world.set_tunnel(1, false)?;
    world.set_tunnel(1, true)?;
    let forwarded = daemon.counters()?.packets("tunnel0", "forwarded")?;
    ensure!(forwarded >= 5, "{forwarded}");
    let counter = r#"tunroute_policy_packets_total{policy="tunnel0",outcome="forwarded"}"#;
    prometheus.wait("the policy's counter", || {
        let value = prometheus.query(counter)?.first().and_then(number);
        Ok(value.filter(|value| (value - f64::from(u32::try_from(forwarded).unwrap_or(0))).abs() < 0.5))
    })?;

    let questions = dashboard()?;
    ensure!(questions.len() > 20, "{}", questions.len());
    for Question { expression, labels } in questions {
        let series = prometheus.wait(&expression, || {
            let series = prometheus.query(&expression)?;
            Ok((series.iter().filter_map(number).any(f64::is_finite)).then_some(series))
        })?;
        for series in series {
            let missing: Vec<_> = labels.iter().filter(|label| series["metric"][label.as_str()].is_null()).collect();
            ensure!(missing.is_empty(), "{expression}: no {missing:?} in {series}");
        }
    }
    Ok(())
}
