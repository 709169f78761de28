//! Answers in, screens out.

use std::time::Duration;

use ratatui::{Terminal, backend::TestBackend};
use serde_json::json;

use super::{
    Paint, draw,
    events::events,
    model::{Model, Rate, Subject, rows},
};
use crate::control::status::Status;

const SECOND: Duration = Duration::from_secs(1);

/// A daemon with two tunnels, after so many packets of 1,000 bytes by the first one.
fn status(packets: u64, change: impl FnOnce(&mut serde_json::Value)) -> Status {
    let counter = |packets: u64| json!({ "packets": packets, "bytes": packets * 1000 });
    let tunnel = |name: &str, sent: u64| {
        json!({
            "name": name, "state": "up", "ifindex": 4, "mtu": 1480, "failed": [],
            "traffic": {
                "sent_packets": sent, "sent_bytes": sent * 1000, "received_packets": sent / 2, "received_bytes": sent * 30,
            },
        })
    };
    let policy = |name: &str, by: &str, packets: u64| {
        json!({
            "name": name, "prefixes": 1, "table": 200, "active": { "v6": by }, "carried_by": { "v6": "fast path" },
            "packets": packets, "bytes": packets * 1000,
            "outcomes": { "forwarded": counter(packets), "exempt": counter(packets / 10), "down": counter(0) },
        })
    };
    let mut status = json!({
        "version": "0.1.0", "pid": 4711, "uptime": 3723, "datapath": "both",
        "tunnels": [tunnel("sixxs0", packets), tunnel("wg0", 0)],
        "policies": [policy("tunnel0", "sixxs0", packets), policy("tunnel1", "wg0", 0)],
        "fast_path": { "state": "on", "reasons": [], "attached": ["ingress dev lan0"] },
        "kernel": { "rules": 2, "routes": 4 }, "problems": [],
    });
    status["tunnels"][0]["probes"] = json!([{
        "tunnel": "sixxs0", "target": "2001:db8::1", "family": "v6", "verdict": "up", "loss-percent": 0.5,
        "mean-delay-us": 12_345, "last-error": null,
    }]);
    change(&mut status);
    serde_json::from_value(status).unwrap()
}

fn unchanged(_: &mut serde_json::Value) {}

fn screen(model: &Model, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model, Paint { colour: true })).unwrap();
    terminal.backend().to_string()
}

#[test]
fn a_rate_is_what_two_answers_differ_by() {
    let rates = |before: &Status, after: &Status, interval| {
        let rows = rows(before, after, interval);
        (rows.policies[0].rate, rows.tunnels[0].sent, rows.outcomes[0].rate.packets)
    };
    let of = |packets| Rate { packets, bytes: packets * 1000 };
    let [some, more] = [100, 700].map(|packets| status(packets, unchanged));
    assert_eq!(rates(&some, &more, SECOND), (of(600), of(600), 60));
    assert_eq!(rates(&some, &more, SECOND * 2), (of(300), of(300), 30));
    assert_eq!(rates(&some, &more, SECOND / 4), (of(2400), of(2400), 240));
    // Counters that have begun anew tell nothing, and no time is no reason to divide by it.
    assert_eq!(rates(&more, &some, SECOND), (of(0), of(0), 0));
    assert_eq!(rates(&some, &some, Duration::ZERO), (of(0), of(0), 0));
    // A new device has sent all of it since.
    let new = status(700, |status| status["tunnels"][0]["ifindex"] = json!(5));
    assert_eq!(rates(&some, &new, SECOND), (of(600), of(700), 60));
    let pending = status(700, |status| status["tunnels"][0]["traffic"] = json!(null));
    assert_eq!(rates(&some, &pending, SECOND), (of(600), of(0), 60));
}

#[test]
fn what_changes_between_two_answers_is_an_event() {
    let before = status(0, unchanged);
    assert_eq!(events(&before, &status(9, unchanged)), [""; 0]);
    for (pointer, value, expected) in [
        ("/pid", json!(4712), "the daemon has been restarted: tunroute 0.1.0, pid 4712"),
        ("/datapath", json!("kernel"), "datapath: both → kernel"),
        ("/tunnels/0/state", json!("down"), "tunnel sixxs0: up → down"),
        ("/tunnels/0/probes/0/verdict", json!("down"), "probe of 2001:db8::1 by sixxs0: up → down"),
        ("/policies/0/active/v6", json!("wg0"), "policy tunnel0, IPv6, leaves by: sixxs0 → wg0"),
        ("/policies/0/carried_by/v6", json!("kernel"), "policy tunnel0, IPv6, decided by: fast path → kernel"),
        ("/fast_path/reasons", json!(["IPsec"]), "closed: IPsec"),
        ("/problems", json!(["cannot add a rule"]), "problem: cannot add a rule"),
    ] {
        let after = status(0, |status| *status.pointer_mut(pointer).unwrap() = value);
        assert_eq!(events(&before, &after), [expected]);
    }
    let fewer = status(0, |status| status["fast_path"]["reasons"] = json!(["IPsec"]));
    assert_eq!(events(&fewer, &before), ["opened: IPsec"]);
    let command = |state: &str| status(0, |status| status["tunnels"][1]["command"] = json!({ "state": state }));
    assert_eq!(events(&command("running"), &command("waiting")), ["command of wg0: running → waiting"]);
    assert_eq!(events(&before, &command("running")), ["command of wg0: new, running"]);
    assert_eq!(events(&command("running"), &before), ["command of wg0: removed"]);
}

/// A minute of more and more packets, during which one thing and another happens.
fn minute() -> Model {
    let mut model = Model::new(status(0, unchanged));
    for second in 1..=60 {
        let status = status(second * second, |status| {
            if (20..40).contains(&second) {
                status["tunnels"][0]["state"] = json!("down");
                status["policies"][0]["active"]["v6"] = json!("wg0");
            }
            if second > 50 {
                status["fast_path"]["state"] = json!("partly");
                status["fast_path"]["reasons"] = json!(["netfilter looks at forwarded IPv6 packets: table inet f"]);
            }
        });
        model.answer(status, SECOND);
    }
    model
}

#[test]
fn it_fits_the_usual_terminal() {
    insta::assert_snapshot!(screen(&minute(), 80, 24));
}

#[test]
fn nothing_is_known_at_first() {
    insta::assert_snapshot!(screen(&Model::new(status(0, unchanged)), 80, 24));
}

#[test]
fn a_large_terminal_has_longer_lines_and_a_small_one_what_matters_most() {
    insta::assert_snapshot!("large", screen(&minute(), 120, 30));
    insta::assert_snapshot!("small", screen(&minute(), 60, 12));
    for (width, height) in [(0, 0), (1, 1), (3, 2), (20, 4), (300, 100)] {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &minute(), Paint { colour: false })).unwrap();
    }
}

#[test]
fn of_many_rows_the_busiest_are_seen() {
    let many = |packets: u64| {
        status(0, |status| {
            let policies = (0..200).map(|number| {
                let mut policy = status["policies"][0].clone();
                policy["name"] = json!(format!("p{number}"));
                policy["packets"] = json!(packets * number);
                policy["bytes"] = json!(packets * number * 100);
                policy
            });
            status["policies"] = policies.collect();
        })
    };
    let mut model = Model::new(many(0));
    model.answer(many(10), SECOND);
    let screen = screen(&model, 80, 24);
    let position = |text: &str| screen.find(text).unwrap_or_else(|| panic!("no {text} in\n{screen}"));
    assert!(position("p199 ") < position("p198 "), "{screen}");
    assert!(!screen.contains("p100 ") && screen.contains(" more"), "{screen}");
}

#[test]
fn a_daemon_that_does_not_answer_is_told_and_waited_for() {
    let mut model = minute();
    for _ in 0..3 {
        model.no_answer("no tunroute daemon answers".to_owned(), SECOND);
    }
    assert!(screen(&model, 80, 24).contains("no answer for 3 s"));
    model.answer(status(3601 + 400, unchanged), SECOND);
    let events: Vec<_> = model.events().map(|(age, what)| (age.as_secs(), what)).collect();
    assert_eq!(
        events.iter().filter(|(age, _)| *age == 3).map(|(_, what)| *what).collect::<Vec<_>>(),
        ["no tunroute daemon answers"]
    );
    assert!(events.contains(&(0, "the daemon answers again")), "{events:?}");
    // What was sent meanwhile is spread over all of it.
    assert_eq!(model.rows().policies[0].rate.packets, 100);
    assert_eq!(model.silence(), None);
}

#[test]
fn a_sparkline_ends_with_the_newest() {
    let mut model = Model::new(status(0, unchanged));
    for packets in [0, 800, 900, 900, 1300] {
        model.answer(status(packets, unchanged), SECOND);
    }
    let subject = Subject::Policy("tunnel0".to_owned());
    assert_eq!(model.sparkline(&subject, 7), "   █▁ ▄");
    assert_eq!(model.sparkline(&subject, 2), " █");
    assert_eq!(model.sparkline(&Subject::Tunnel("other".to_owned()), 3), "   ");
}
