//! The least that a program could do. The programs are in `ebpf/src/floors.rs`.

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader,
    programs::{
        LinkOrder, Program, TcAttachType, XdpMode,
        tc::{SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
};

use super::{Contestant, Delivery, Installed, Task, main_route};
use crate::{
    load::Pattern,
    site::{INGRESS, Site, TUNNELS, Target, UPLINK},
};

/// A program on the ingress device, ahead of the kernel's main route.
pub struct Floor {
    name: &'static str,
    about: &'static str,
    program: &'static str,
    delivery: Delivery,
}

/// Drops.
pub const DROP: Floor = Floor {
    name: "floor-drop",
    about: "a TC program that drops: receiving alone",
    program: "drop_all",
    delivery: Delivery::Nowhere,
};
/// Redirects.
pub const REDIRECT: Floor = Floor {
    name: super::FLOOR,
    about: "a TC program that redirects to one device without a look at the packet",
    program: "redirect_all",
    delivery: Delivery::Anywhere,
};
/// Steps aside.
pub const ASIDE: Floor = Floor {
    name: "floor-aside",
    about: "main-route behind a TC program that looks at nothing and steps aside",
    program: "step_aside",
    delivery: Delivery::Anywhere,
};

/// Redirects frames.
pub const EARLY_REDIRECT: Floor = Floor {
    name: super::XDP_FLOOR,
    about: "an XDP program that redirects to one device without a look at the frame",
    program: "redirect_early",
    delivery: Delivery::Anywhere,
};
/// Steps aside before there is an skb.
pub const EARLY_ASIDE: Floor = Floor {
    name: "floor-xdp-aside",
    about: "main-route behind an XDP program that looks at nothing and steps aside",
    program: "step_aside_early",
    delivery: Delivery::Anywhere,
};

/// Held: dropping it detaches the program.
enum Attached {
    Tc { _link: SchedClassifierLink },
    Xdp { _link: XdpLink },
}

impl Installed for Attached {}

impl Contestant for Floor {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn delivery(&self) -> Delivery {
        self.delivery
    }

    fn declines(&self, task: &Task) -> Option<&'static str> {
        let early = [EARLY_REDIRECT.program, EARLY_ASIDE.program].contains(&self.program);
        if early
            && (task.target != Target::Veth
                || self.program == EARLY_REDIRECT.program && task.pattern == Pattern::Unmatched)
        {
            return Some("XDP has no part in this");
        }
        let needs_header = task.target != Target::Tun || task.pattern == Pattern::Unmatched;
        (self.delivery == Delivery::Anywhere && self.program == REDIRECT.program && needs_header)
            .then_some("an Ethernet device needs a new header, which a bare redirect does not write")
    }

    fn forwards_only(&self) -> bool {
        true
    }

    fn install(&self, site: &Site, task: &Task) -> Result<Box<dyn Installed>> {
        main_route::BASELINE.install(site, task)?;
        let target = if task.pattern == Pattern::Unmatched { UPLINK } else { TUNNELS[0] };
        let ifindex = site.host.ifindex(target)?;
        site.host.run_in(|| {
            let mut ebpf = EbpfLoader::new()
                .override_global("TARGET", &ifindex, true)
                .load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/floors")))
                .context("cannot load the floors' programs")?;
            let attached = match ebpf.program_mut(self.program).context("a program is missing")? {
                Program::SchedClassifier(program) => {
                    program.load()?;
                    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                    let link = program.attach_with_options(INGRESS, TcAttachType::Ingress, options)?;
                    Attached::Tc { _link: program.take_link(link)? }
                }
                Program::Xdp(program) => {
                    program.load()?;
                    let link = program.attach(INGRESS, XdpMode::Driver)?;
                    Attached::Xdp { _link: program.take_link(link)? }
                }
                _ => bail!("{} is of another type", self.program),
            };
            Ok(Box::new(attached) as Box<dyn Installed>)
        })
    }
}
