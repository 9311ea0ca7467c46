//! What a packet, a transaction, a connection and a request cost: every kind of work on
//! every path.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    Settings,
    cpu::{self, Account},
    generators::{CONNECTIONS, Iperf3, PAGE_BYTES, Web},
    measurement::{Better, Contender, Cpu, Measurement},
    node::Recipe,
    paths::{CALLED, Family, Path, Site},
    peer::{Caller, Connector, Ends, Flow, Transport},
    run::{Found, Progress, Run, Step},
};

/// Datagrams that are under way at once: far fewer than a socket's buffer holds, even if each
/// takes a page, as XDP's do.
const BURST: usize = 32;
/// Streams of many.
const STREAMS: usize = 8;

/// A flow first runs for this part of a slice, which does not count.
pub(super) const WARM_UP: u32 = 5;
/// About how long it takes to connect one.
pub(super) const CONNECT: Duration = Duration::from_millis(8);

pub(super) const TCP_RR: Transport = Transport::Tcp;
pub(super) const UDP_RR: Transport = Transport::Udp { quota: 1, size: 1 };
pub(super) const UDP_FLOW: Transport = udp_flow(64);

const fn udp_flow(size: usize) -> Transport {
    Transport::Udp { quota: BURST, size }
}

/// Parts of 1, of which is told how long a transaction took at most.
const QUANTILES: [f64; 13] = [
    0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0,
];
/// The one that is compared turn by turn.
const TAIL: f64 = 0.99;
/// Digits of a latency that are kept, and the longest, in ns: what takes longer is lost.
const DIGITS: u8 = 3;
const LONGEST: u64 = 10_000_000_000;

const OUTSIDE_NOTE: &str = "Pod to outside: the machine outside has no route to the pods, so what \
     it answers was masqueraded. New connections go to eight addresses of it in turn, each \
     datagram of UDP_CRR to another of 65,536. kube-proxy's rules are those that every node has, \
     and of a service.";

const XDP_NOTE: &str = "XDP: the uplink is a veth. One that receives by XDP takes segmentation \
     offload from its peer (veth_xdp_set of Linux's drivers/net/veth.c), so its TCP streams come \
     in single packets.";

/// What the figures are.
fn note() -> String {
    format!(
        "Traffic: both ends of all of it run on one CPU. TCP streams are iperf3's; HTTP is that \
         of wrk, which asks nginx for a page of {PAGE_BYTES} bytes on {CONNECTIONS} connections. \
         The rest is the bench's own: its turns are some hundredths of a second, which those of \
         sockperf and qperf cannot be, and it loses no packet. Each {BURST} packets of \"UDP, 64 \
         bytes\" and \"1400 bytes\" are answered by one. The floor is a veth pair straight between \
         the two ends of a path."
    )
}

/// How much of it is measured.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Plan {
    /// Fewer kinds of work, over IPv4.
    quick: bool,
    /// Rounds with traffic of the bench's own, and how long a turn is, in ms.
    rounds: usize,
    slice_ms: u64,
    /// Rounds with generators, of which each has its own turns.
    generator_rounds: usize,
    /// What iperf3 sends in a turn.
    stream_bytes: u64,
}

impl Plan {
    pub(super) const QUICK: Self = Self {
        quick: true,
        rounds: 8,
        slice_ms: 40,
        generator_rounds: 8,
        stream_bytes: 50_000_000,
    };
    pub(super) const FULL: Self = Self {
        quick: false,
        rounds: 12,
        slice_ms: 60,
        generator_rounds: 8,
        stream_bytes: 100_000_000,
    };

    fn slice(self) -> Duration {
        Duration::from_millis(self.slice_ms)
    }

    fn tests(self) -> impl Iterator<Item = Test> {
        let everywhere = Path::ALL.into_iter().flat_map(|path| {
            Family::ALL.into_iter().flat_map(move |family| {
                let timed = matches!(path, Path::PodToPod | Path::OutsideToPort);
                let timed = if timed { TIMED } else { &[] };
                let works = EVERYWHERE.iter().chain(timed);
                works.map(move |&work| Test::new(path, work, family))
            })
        });
        let outside = |work, beside| Test {
            beside,
            ..Test::new(Path::PodToOutside, work, Family::V4)
        };
        let calls = outside(Work::UdpCrr, Beside::Nothing);
        // The rules stay: these come last.
        let beside = BESIDE_KUBE_PROXY
            .iter()
            .map(move |&work| outside(work, Beside::KubeProxy));
        let all = everywhere.chain([calls]).chain(beside);
        all.filter(move |test| !self.quick || test.is_quick())
    }
}

/// What is done over a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// So many TCP streams.
    Stream(usize),
    TcpRr,
    TcpCrr,
    UdpRr,
    UdpCrr,
    /// Datagrams of so many bytes.
    Udp(usize),
    /// Requests, on connections that stay or on one for each.
    Http {
        stay: bool,
    },
    /// TCP_RR and UDP_RR, of which each transaction is timed.
    TcpEach,
    UdpEach,
}

const EVERYWHERE: &[Work] = &[
    Work::Stream(1),
    Work::Stream(STREAMS),
    Work::TcpRr,
    Work::TcpCrr,
    Work::UdpRr,
    Work::Udp(64),
    Work::Udp(1400),
    Work::Http { stay: true },
    Work::Http { stay: false },
];
const TIMED: &[Work] = &[Work::TcpEach, Work::UdpEach];
const BESIDE_KUBE_PROXY: &[Work] = &[Work::TcpCrr, Work::UdpCrr, Work::TcpRr, Work::UdpRr];

/// What rates are told in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tell {
    /// µs for one.
    Time,
    /// 1000 a second.
    Thousands,
    /// Of megabytes: 10⁹ bits a second.
    Gigabits,
}

impl Tell {
    fn of(self, rate: f64) -> f64 {
        match self {
            Self::Time => 1e6 / rate,
            Self::Thousands => rate / 1e3,
            Self::Gigabits => rate * 8.0 / 1e3,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Time => "µs",
            Self::Thousands => "1000/s",
            Self::Gigabits => "Gbit/s",
        }
    }

    fn better(self) -> Better {
        match self {
            Self::Time => Better::Lower,
            Self::Thousands | Self::Gigabits => Better::Higher,
        }
    }
}

impl Work {
    fn name(self) -> String {
        match self {
            Self::Stream(1) => "TCP stream".to_owned(),
            Self::Stream(count) => format!("{count} TCP streams"),
            Self::TcpRr => "TCP_RR".to_owned(),
            Self::TcpCrr => "TCP_CRR".to_owned(),
            Self::UdpRr => "UDP_RR".to_owned(),
            Self::UdpCrr => "UDP_CRR".to_owned(),
            Self::Udp(size) => format!("UDP, {size} bytes"),
            Self::Http { stay: true } => "HTTP".to_owned(),
            Self::Http { stay: false } => "HTTP, a connection each".to_owned(),
            Self::TcpEach => "TCP_RR, 99th percentile".to_owned(),
            Self::UdpEach => "UDP_RR, 99th percentile".to_owned(),
        }
    }

    fn tell(self) -> Tell {
        match self {
            Self::Stream(_) => Tell::Gigabits,
            Self::TcpRr | Self::UdpRr | Self::TcpEach | Self::UdpEach => Tell::Time,
            Self::TcpCrr | Self::UdpCrr | Self::Udp(_) | Self::Http { .. } => Tell::Thousands,
        }
    }

    fn rounds(self, plan: Plan) -> usize {
        match self {
            Self::Stream(_) | Self::Http { .. } => plan.generator_rounds,
            _ => plan.rounds,
        }
    }

    /// How long a turn takes, in ms.
    fn turn(self, plan: Plan) -> u64 {
        match self {
            // At some 8 Gbit/s.
            Self::Stream(_) => 25 + plan.stream_bytes / 1_000_000,
            Self::Http { .. } => 220,
            _ => {
                let time = plan.slice() + plan.slice() / WARM_UP + CONNECT;
                u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
            }
        }
    }
}

/// What else is on the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Nothing,
    KubeProxy,
}

/// A kind of work on a path.
#[derive(Clone, Copy, Debug)]
struct Test {
    path: Path,
    work: Work,
    beside: Beside,
    family: Family,
}

impl Test {
    fn new(path: Path, work: Work, family: Family) -> Self {
        Self {
            path,
            work,
            beside: Beside::Nothing,
            family,
        }
    }

    /// Whether a quick run has the time for it.
    fn is_quick(&self) -> bool {
        let on_path = match self.work {
            Work::Stream(1) | Work::TcpRr | Work::TcpCrr | Work::Udp(64) => true,
            Work::Http { stay } => {
                stay && !matches!(self.path, Path::PodToHost | Path::LocalhostToPort)
            }
            _ => false,
        };
        on_path && self.family == Family::V4 && self.beside == Beside::Nothing
    }

    fn name(&self) -> String {
        let beside = match self.beside {
            Beside::Nothing => "",
            Beside::KubeProxy => ", beside kube-proxy",
        };
        let (path, work, family) = (self.path.name(), self.work.name(), self.family.name());
        format!("{path}, {work}{beside}, {family}")
    }

    fn step(&self, settings: &Settings) -> Step {
        let contenders = settings.contenders.iter();
        let lanes = contenders.filter(|&&who| self.path.concerns(who)).count();
        let turns = rounds(self.work, settings.traffic, lanes) * lanes;
        Step {
            name: self.name(),
            estimate: turns as u64 * self.work.turn(settings.traffic),
        }
    }
}

/// As many rounds as planned, or some fewer: of `lanes` everyone goes first equally often.
fn rounds(work: Work, plan: Plan, lanes: usize) -> usize {
    let lanes = lanes.max(1);
    (work.rounds(plan) / lanes).max(1) * lanes
}

fn tests(settings: &Settings) -> impl Iterator<Item = Test> {
    let tests = settings.traffic.tests();
    tests.filter(|test| test.name().contains(&settings.matching))
}

/// One for each kind of work on each path, over each IP version.
pub(super) fn steps(settings: &Settings) -> Vec<Step> {
    tests(settings).map(|test| test.step(settings)).collect()
}

/// Measures all of them.
pub(super) fn measure(settings: &Settings, recipe: &Recipe, run: &mut Run) -> Result<()> {
    if !run.wants(&steps(settings)) {
        return Ok(());
    }
    run.say("making nodes");
    let sites = settings
        .contenders
        .iter()
        .map(|&contender| Site::new(contender, recipe))
        .collect::<Result<Vec<_>>>()?;
    for test in tests(settings) {
        run.step(&test.step(settings), |progress| {
            test.run(settings, &sites, progress)
        })?;
    }
    Ok(())
}

/// What lasts from turn to turn. Of flows nothing does: where the kernel puts a socket makes a
/// difference of a per cent for as long as it lives.
enum Tool<'a> {
    Streams(Iperf3<'a>, usize),
    Requests(Web<'a>, bool),
    Flow {
        ends: Ends<'a>,
        transport: Transport,
        /// Packets of a transaction.
        burst: usize,
        /// Whether each transaction is timed.
        each: bool,
    },
    /// Connections, to these addresses in turn if there are any.
    Connections(Ends<'a>, Vec<IpAddr>),
    Calls(Ends<'a>),
}

/// What came of a turn.
struct Turn {
    /// Transactions, packets, connections, requests, or megabytes a second.
    rate: f64,
    /// Of each transaction, in ns, if they were timed.
    latencies: Option<Histogram<u64>>,
}

impl From<f64> for Turn {
    fn from(rate: f64) -> Self {
        Self {
            rate,
            latencies: None,
        }
    }
}

impl<'a> Tool<'a> {
    fn new(test: &Test, site: &'a Site, cpu: usize) -> Result<Self> {
        let ends = site.ends(test.path, test.family, cpu);
        let everywhere = Ends {
            listen: (test.family.any(), ends.listen.port()).into(),
            ..ends
        };
        let flow = |transport, burst, each| Self::Flow {
            ends,
            transport,
            burst,
            each,
        };
        Ok(match test.work {
            Work::Stream(count) => Self::Streams(Iperf3::start(ends)?, count),
            Work::Http { stay } => Self::Requests(Web::start(ends)?, stay),
            Work::TcpRr => flow(TCP_RR, 1, false),
            Work::UdpRr => flow(UDP_RR, 1, false),
            Work::TcpEach => flow(TCP_RR, 1, true),
            Work::UdpEach => flow(UDP_RR, 1, true),
            Work::Udp(size) => flow(udp_flow(size), BURST, false),
            Work::TcpCrr if test.path == Path::PodToOutside => {
                Self::Connections(everywhere, test.family.servers().into())
            }
            Work::TcpCrr => Self::Connections(ends, Vec::new()),
            Work::UdpCrr => Self::Calls(everywhere),
        })
    }

    /// Takes a turn, and books what it took of the CPU.
    fn turn(&self, plan: Plan, account: &mut Account) -> Result<Turn> {
        let (slice, warm_up) = (plan.slice(), plan.slice() / WARM_UP);
        Ok(match self {
            Self::Streams(iperf3, count) => {
                let bits = account.book(|| iperf3.run(plan.stream_bytes, *count))?;
                (bits / 8e6).into()
            }
            Self::Requests(web, stay) => web.run(*stay, account)?.into(),
            Self::Connections(ends, addresses) => {
                let connector = Connector::start(ends)?.spread(addresses);
                let found = account.book(|| {
                    connector.run(warm_up)?;
                    connector.run(slice)
                })?;
                found.rate.into()
            }
            Self::Calls(ends) => {
                let [first, last] = CALLED;
                let mut caller = Caller::start(ends, first..=last)?;
                let rate = account.book(|| {
                    caller.run(warm_up)?;
                    caller.run(slice)
                })?;
                rate.into()
            }
            &Self::Flow {
                ref ends,
                transport,
                burst,
                each,
            } => {
                let mut flow = Flow::start(ends, transport)?;
                let mut latencies = each.then(histogram).transpose()?;
                let rate = account.book(|| {
                    flow.run(warm_up)?;
                    let Some(latencies) = &mut latencies else {
                        return flow.run(slice);
                    };
                    flow.run_telling(slice, |time| record(latencies, time))
                })?;
                Turn {
                    rate: rate * burst as f64,
                    latencies,
                }
            }
        })
    }
}

/// A contender, what it is asked with, and what came of it.
struct Lane<'a> {
    site: &'a Site,
    tool: Tool<'a>,
    values: Vec<f64>,
    account: Account,
    /// How long one transaction took in each turn, in µs.
    times: Vec<f64>,
    latencies: Histogram<u64>,
}

impl Lane<'_> {
    fn turn(&mut self, plan: Plan, tell: Tell) -> Result<()> {
        let turn = self.tool.turn(plan, &mut self.account)?;
        self.times.push(1e6 / turn.rate);
        self.values.push(match turn.latencies {
            Some(latencies) => {
                self.latencies.add(&latencies)?;
                microseconds(&latencies, TAIL)
            }
            None => tell.of(turn.rate),
        });
        Ok(())
    }

    /// What a transaction took of the CPU.
    fn cpu(&self) -> Cpu {
        let mean = self.times.iter().sum::<f64>() / self.times.len() as f64;
        self.account.shares(mean)
    }
}

/// One for latencies, in ns.
fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_max(LONGEST, DIGITS)?)
}

fn record(latencies: &mut Histogram<u64>, time: Duration) {
    latencies.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
}

/// How long so many of the transactions took at most.
fn microseconds(latencies: &Histogram<u64>, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64 / 1e3
}

impl Test {
    /// Has all contenders take their turns.
    fn run(&self, settings: &Settings, sites: &[Site], progress: &Progress<'_>) -> Result<Found> {
        let plan = settings.traffic;
        let mut notes = vec![note(), cpu::NOTE.to_owned()];
        if self.path == Path::PodToOutside {
            notes.push(OUTSIDE_NOTE.to_owned());
        }
        if self.path.concerns(Contender::Xdp) {
            notes.push(XDP_NOTE.to_owned());
        }
        let mut lanes = Vec::new();
        for site in sites
            .iter()
            .filter(|site| self.path.concerns(site.contender))
        {
            if !site.reaches(self.path, self.family) {
                notes.push(format!(
                    "{} over {}: {} refuses it.",
                    self.path.name(),
                    self.family.name(),
                    site.contender.name(),
                ));
                continue;
            }
            if self.beside == Beside::KubeProxy {
                site.add_kube_proxy()?;
            }
            lanes.push(Lane {
                site,
                tool: Tool::new(self, site, settings.cpu).with_context(|| site.whose())?,
                values: Vec::new(),
                account: Account::new(settings.cpu),
                times: Vec::new(),
                latencies: histogram()?,
            });
        }
        let count = lanes.len();
        for round in 0..rounds(self.work, plan, count) {
            for turn in 0..count {
                // Everyone goes first as often as the others.
                let lane = &mut lanes[(round + turn) % count];
                let site = lane.site;
                lane.turn(plan, self.work.tell())
                    .with_context(|| site.whose())?;
                progress.advance(self.work.turn(plan));
            }
        }
        let tell = self.work.tell();
        let of = |lane: &Lane<'_>| (lane.site.contender, lane.values.clone());
        let values = lanes.iter().map(of).collect();
        let mut measurement = Measurement::new(self.name(), tell.unit(), tell.better(), values);
        for lane in lanes {
            let contender = lane.site.contender;
            measurement.cpu.push((contender, lane.cpu()));
            if !lane.latencies.is_empty() {
                let told = QUANTILES.map(|part| (part, microseconds(&lane.latencies, part)));
                measurement.latencies.push((contender, told.into()));
            }
        }
        Ok(Found {
            measurements: vec![measurement],
            notes,
            ..Found::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_work_is_done_on_every_path() {
        let tests: Vec<_> = Plan::FULL.tests().collect();
        let names: BTreeSet<_> = tests.iter().map(Test::name).collect();
        assert_eq!(names.len(), tests.len(), "steps are known by their names");
        for path in Path::ALL {
            for family in Family::ALL {
                for work in [
                    "TCP stream",
                    "8 TCP streams",
                    "TCP_RR",
                    "TCP_CRR",
                    "UDP_RR",
                    "UDP, 64 bytes",
                    "UDP, 1400 bytes",
                    "HTTP",
                    "HTTP, a connection each",
                ] {
                    let name = format!("{}, {work}, {}", path.name(), family.name());
                    assert!(names.contains(&name), "{name}");
                }
            }
        }
        assert!(names.contains("pod to outside, UDP_CRR, beside kube-proxy, IPv4"));
        assert!(names.contains("outside to published port, UDP_RR, 99th percentile, IPv6"));
        let last = tests.iter().position(|test| test.beside != Beside::Nothing);
        let last = &tests[last.unwrap()..];
        assert!(last.iter().all(|test| test.beside == Beside::KubeProxy));
    }

    #[test]
    fn quick_tests_are_some_of_the_others() {
        let names = |plan: Plan| -> BTreeSet<_> { plan.tests().map(|test| test.name()).collect() };
        let quick = names(Plan::QUICK);
        assert!(quick.is_subset(&names(Plan::FULL)));
        for path in Path::ALL {
            assert!(quick.iter().any(|name| name.starts_with(path.name())));
        }
    }

    #[test]
    fn everyone_goes_first_equally_often() {
        for (lanes, expected) in [(0, 8), (1, 8), (2, 8), (3, 6), (4, 8), (5, 5), (9, 9)] {
            let found = rounds(Work::Stream(1), Plan::FULL, lanes);
            assert_eq!(found, expected, "{lanes}");
        }
    }

    #[test]
    fn rates_are_told_in_their_units() {
        assert_eq!(Tell::Time.of(200_000.0), 5.0);
        assert_eq!(Tell::Thousands.of(200_000.0), 200.0);
        // 1,250 megabytes a second.
        assert_eq!(Tell::Gigabits.of(1250.0), 10.0);
    }

    #[test]
    fn a_histogram_is_told_in_microseconds() {
        let mut latencies = histogram().unwrap();
        for time in 1..=100 {
            record(&mut latencies, Duration::from_micros(time));
        }
        let near = |quantile, expected: f64| {
            let found = microseconds(&latencies, quantile);
            assert!((found / expected - 1.0).abs() < 0.01, "{found}");
        };
        near(0.5, 50.0);
        near(TAIL, 99.0);
        near(1.0, 100.0);
    }
}
