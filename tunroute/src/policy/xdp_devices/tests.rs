use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::policy::net::Link;

const CARD: u64 = BASIC | REDIRECT | TRANSMIT;

fn link(index: IfIndex, name: &str, layer: LinkLayer) -> (IfIndex, Link) {
    (index, Link::new(index, name, layer))
}

/// A host with an ingress device (1) and two tunnels (2, 3).
fn host() -> KernelState {
    let layer = LinkLayer::Ethernet;
    let links = [link(1, "lan0", layer), link(2, "tap0", layer), link(3, "tun0", LinkLayer::Ip)].into();
    KernelState { links, ..KernelState::default() }
}

fn config(more: &str, tunnel: &str) -> Config {
    let text = format!(
        "{more}\n[interfaces]\ningress = [\"lan0\"]\n[tunnel.tap0]\n{tunnel}\n[tunnel.tun0]\n\
         [[policy]]\nname = \"p\"\nfrom = [\"10.0.0.0/8\"]\nvia = [\"tap0\", \"tun0\"]"
    );
    Config::parse("test", &text).expect("a configuration")
}

/// Every device as it should be.
fn devices() -> BTreeMap<IfIndex, Device> {
    let card = Device {
        address: [2; 6],
        features: Some(CARD),
        program: None,
        origin: Origin::Card { tags: false },
        queue: "mq".to_owned(),
        filters: 0,
    };
    [(1, card.clone()), (2, card)].into()
}

fn chosen(config: &Config, devices: &BTreeMap<IfIndex, Device>) -> Chosen {
    choose(config, &host(), devices, &BTreeSet::new(), &BTreeMap::new())
}

#[test]
fn all_take_part_that_can() {
    let chosen = chosen(&config("", ""), &devices());
    assert_eq!(chosen.stations, [(1, [2; 6])].into());
    assert_eq!(chosen.targets, [2].into());
    let tun = (Role::Tunnel, "tun0".to_owned(), Some(Obstacle::NoTransmit));
    assert!(chosen.devices.contains(&tun), "{:?}", chosen.devices);
    assert_eq!(self::chosen(&config("xdp = \"off\"", ""), &devices()), Chosen::default());
}

#[test]
fn each_obstacle_keeps_a_device_out() {
    let auto = "";
    type Change = fn(&mut Device);
    let cases: [(&str, IfIndex, Change, Obstacle); 9] = [
        (auto, 1, |device| device.features = None, Obstacle::Untold),
        (auto, 1, |device| device.features = Some(BASIC), Obstacle::NoDriver),
        (auto, 1, |device| device.program = Some(7), Obstacle::OtherProgram(7)),
        (auto, 1, |device| device.origin = Origin::Card { tags: true }, Obstacle::Tags),
        ("xdp = \"on\"", 1, |device| device.origin = Origin::Tap, Obstacle::Tap),
        (auto, 1, |device| device.origin = Origin::Elsewhere, Obstacle::Elsewhere),
        (
            "xdp = \"on\"",
            1,
            |device| device.origin = Origin::Peer { checksums: false, tags: true },
            Obstacle::Unfinished,
        ),
        (auto, 2, |device| device.queue = "tbf".to_owned(), Obstacle::Queue("tbf".to_owned())),
        (auto, 2, |device| device.filters = 1, Obstacle::Filters),
    ];
    for (more, index, change, obstacle) in cases {
        let mut devices = devices();
        change(devices.get_mut(&index).expect("a device"));
        let chosen = chosen(&config(more, ""), &devices);
        let told = chosen.devices.iter().any(|(_, _, told)| told.as_ref() == Some(&obstacle));
        assert!(told, "{obstacle:?}: {:?}", chosen.devices);
        // Without a tunnel that takes frames, no frame is looked at.
        assert!(chosen.stations.is_empty(), "{obstacle:?}");
        assert_eq!(chosen.targets.is_empty(), index == 2, "{obstacle:?}");
    }
    let limited = chosen(&config("", "mss = \"auto\""), &devices());
    assert!(limited.targets.is_empty() && limited.stations.is_empty());
}

#[test]
fn our_own_program_is_no_obstacle_and_a_refused_one_is() {
    let mut devices = devices();
    devices.get_mut(&1).expect("a device").program = Some(7);
    let (config, host, ours) = (config("", ""), host(), [1].into());
    assert_eq!(choose(&config, &host, &devices, &ours, &BTreeMap::new()).stations.len(), 1);
    let refused = [(1, "no room".to_owned())].into();
    let chosen = choose(&config, &host, &devices, &ours, &refused);
    assert!(chosen.stations.is_empty());
    let told = (Role::Ingress, "lan0".to_owned(), Some(Obstacle::Refused("no room".to_owned())));
    assert!(chosen.devices.contains(&told), "{:?}", chosen.devices);
}

/// A veth device out of sight takes part where the operator says so.
#[test]
fn what_cannot_be_seen_is_for_the_operator_to_say() {
    let mut devices = devices();
    devices.get_mut(&1).expect("a device").origin = Origin::Elsewhere;
    assert_eq!(chosen(&config("xdp = \"on\"", ""), &devices).stations.len(), 1);
}
