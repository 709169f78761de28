//! The metrics endpoint, read as a monitoring system reads it.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
};

use anyhow::{Context, Result, ensure};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, TUNNELS, TunnelKind, World, pace::SOON, ping, plan::REMOTE, traffic::Answer,
};

const ADDRESS: &str = "127.0.0.1:9942";

/// What was asked for, and the answer.
fn exchange(mut stream: impl Read + Write, request: &str) -> Result<String> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn get(world: &World, path: &str) -> Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nAccept: application/openmetrics-text\r\n\r\n");
    world.host.run_in(|| exchange(TcpStream::connect(ADDRESS).context("cannot connect")?, &request))
}

/// The samples by name and labels. Every line must be one, or a comment, and the last says that nothing is cut off.
fn samples(answer: &str) -> Result<BTreeMap<String, f64>> {
    let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    ensure!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    ensure!(body.ends_with("# EOF\n"), "cut off: {body}");
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (sample, value) = line.rsplit_once(' ').with_context(|| format!("not a sample: {line}"))?;
            ensure!(sample.starts_with("tunroute_"), "{line}");
            Ok((sample.to_owned(), value.parse().with_context(|| format!("not a number: {line}"))?))
        })
        .collect()
}

/// The value of the sample with this name and, in whatever order, these labels.
fn value(samples: &BTreeMap<String, f64>, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    let mut found = samples.iter().filter(|(sample, _)| {
        sample.split('{').next() == Some(name)
            && labels.iter().all(|(label, value)| sample.contains(&format!("{label}=\"{value}\"")))
    });
    let (_, value) = found.next().with_context(|| format!("no {name} {labels:?} in {samples:#?}"))?;
    ensure!(found.next().is_none(), "more than one {name} {labels:?}");
    Ok(*value)
}

#[test]
fn metrics_say_what_the_status_says() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    world.host.ip("link set lo up")?;
    let with = |metrics: &str| format!("metrics = \"{metrics}\"\n{}", world.config());
    let daemon = Daemon::start(&world, &with(ADDRESS), &DaemonOptions::default())?;
    let mut seen = Capture::on(&world.brokers[0], "sixxs0")?;
    let src = TUNNELS[0].client.of(Family::V6);
    assert_eq!(ping(&world.client, src, REMOTE.of(Family::V6))?, Answer::Reply);
    seen.drain()?;

    let status = daemon.status()?;
    let samples = samples(&get(&world, "/metrics")?)?;
    let policy = &status["policies"][0];
    let forwarded = policy["outcomes"]["forwarded"]["packets"].as_f64().context("no counter")?;
    assert!(forwarded >= 1.0, "{status}");
    let labels = [("policy", "tunnel0"), ("outcome", "forwarded")];
    assert!((value(&samples, "tunroute_policy_packets_total", &labels)? - forwarded).abs() < 0.5);
    let bytes = policy["outcomes"]["forwarded"]["bytes"].as_f64().context("no counter")?;
    assert!((value(&samples, "tunroute_policy_bytes_total", &labels)? - bytes).abs() < 0.5);
    for (name, labels, expected) in [
        ("tunroute_tunnel_up", &[("tunnel", "sixxs0")][..], 1.0),
        ("tunroute_tunnel_state", &[("tunnel", "sixxs1"), ("state", "up")][..], 1.0),
        ("tunroute_gates_closed", &[("gate", "netfilter")][..], 0.0),
        ("tunroute_policy_on_fast_path", &[("policy", "tunnel0"), ("family", "IPv6")][..], 1.0),
        ("tunroute_policy_prefixes", &[("policy", "tunnel1")][..], 4.0),
        ("tunroute_policy_leaves_by", &[("policy", "tunnel1"), ("family", "IPv4"), ("by", "sixxs1")][..], 1.0),
        ("tunroute_fast_path_on", &[], 1.0),
        ("tunroute_problems", &[], 0.0),
        ("tunroute_map_entries", &[("map", "POLICY")][..], 4.0),
        ("tunroute_kernel_rules", &[], 8.0),
        ("tunroute_repairs_total", &[], 0.0),
    ] {
        let found = value(&samples, name, labels)?;
        assert!((found - expected).abs() < 1e-9, "{name} {labels:?} is {found}, expected {expected}");
    }
    assert!(value(&samples, "tunroute_pass_duration_seconds_count", &[])? >= 1.0);
    // All that the device has sent: at least what the fast path has handed to it.
    let sent = [("tunnel", "sixxs0"), ("direction", "sent")];
    assert!(value(&samples, "tunroute_tunnel_packets_total", &sent)? >= forwarded);
    assert!(value(&samples, "tunroute_tunnel_bytes_total", &sent)? >= bytes);

    // What the daemon repairs, it counts.
    world.host.ip("-6 rule del pref 20080 from 2a02:578:85a0::/48")?;
    let repaired = || value(&self::samples(&get(&world, "/metrics")?)?, "tunroute_repairs_total", &[]);
    daemon.wait_status(|_| repaired().is_ok_and(|repairs| repairs > 0.5), SOON)?;

    assert!(get(&world, "/")?.starts_with("HTTP/1.1 404 "));
    let posted =
        world.host.run_in(|| exchange(TcpStream::connect(ADDRESS)?, "POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))?;
    assert!(posted.starts_with("HTTP/1.1 405 "), "{posted}");
    Ok(())
}

#[test]
fn the_endpoint_follows_the_configuration() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    world.host.ip("link set lo up")?;
    let with = |metrics: &str| format!("metrics = \"{metrics}\"\n{}", world.config());
    // Somebody else has the port: all else works, and the endpoint comes when the port is free.
    let other = world.host.run_in(|| TcpListener::bind(ADDRESS).context("cannot listen"))?;
    let daemon = Daemon::start(&world, &with(ADDRESS), &DaemonOptions::default())?;
    let hinted = |status: &serde_json::Value| status["hints"].to_string().contains("no metrics at");
    assert!(hinted(&daemon.status()?));
    drop(other);
    daemon.wait_status(|status| !hinted(status), SOON)?;
    samples(&get(&world, "/metrics")?)?;

    let socket = world.dir().join("metrics.sock");
    daemon.write_config(&with(&format!("unix:{}", socket.display())))?;
    daemon.reload()?;
    let request = "GET /metrics HTTP/1.0\r\n\r\n";
    let answer = exchange(UnixStream::connect(&socket)?, request)?;
    assert!(answer.contains("tunroute_tunnel_up"), "{answer}");
    assert_eq!(socket.metadata()?.permissions().mode() & 0o777, 0o600);
    assert!(get(&world, "/metrics").is_err(), "the old endpoint is gone");

    daemon.write_config(&world.config())?;
    daemon.reload()?;
    assert!(!socket.exists());
    Ok(())
}
