//! What is asked of the daemon over its control socket.

use super::{Daemon, Exit, read::Purpose};
use crate::control::socket::{Answer, Call, Request};

impl Daemon {
    /// Carries out a request and answers it. Returns the reason if the daemon has to stop.
    pub(super) async fn answer(&mut self, call: Call) -> Option<Exit> {
        let (request, answer) = match call {
            (request @ Request::Explain { .. }, answer) => self.put_off(request, answer)?,
            call => call,
        };
        let done = |result: anyhow::Result<Answer>| result.unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let told = match request {
            Request::Down => return Some(Exit::Down(Some(answer))),
            // The answers of these come later.
            Request::Verify { samples } => {
                self.start_verify(samples, answer);
                return None;
            }
            Request::Plan { file } => {
                let file = file.unwrap_or_else(|| self.options.config.clone());
                self.read(Purpose::Plan(file), Some(answer));
                return None;
            }
            Request::Reload => {
                self.read(Purpose::Reload, Some(answer));
                return None;
            }
            Request::Apply { seconds } => {
                self.read(Purpose::Trial(seconds), Some(answer));
                return None;
            }
            Request::Status => Answer::Status(Box::new(self.status())),
            Request::Explain { source, destination, iif } => {
                let explanation = self.explain(source, destination, iif.as_deref());
                done(explanation.map(|explanation| Answer::Explanation(Box::new(explanation))))
            }
            Request::Start { tunnel } if self.supervisor.reset(&tunnel) => Answer::Done,
            Request::Start { tunnel } => {
                Answer::Failed(format!("no tunnel \"{tunnel}\" with an `up` command is configured"))
            }
            Request::Trace { session, wanted } => done(self.trace(session, &wanted).map(Answer::Traced)),
            Request::Confirm => done(self.confirm().map(|()| Answer::Done)),
        };
        let _nobody_waits = answer.send(told);
        None
    }
}
