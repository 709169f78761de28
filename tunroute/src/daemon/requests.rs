//! What is asked of the daemon over its control socket.

use std::time::Duration;

use super::{Daemon, Exit};
use crate::control::{Answer, Call, Request};

impl Daemon {
    /// Does what is asked, and answers. Returns whether the daemon is to stop.
    pub(super) async fn answer(&mut self, (request, answer): Call) -> Option<Exit> {
        let done = |result: anyhow::Result<Answer>| result.unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let told = match request {
            Request::Down => return Some(Exit::Down(Some(answer))),
            // Its answer comes later.
            Request::Verify { samples } => {
                self.start_verify(samples, answer);
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
            Request::Plan { file } => done(self.preview(file.as_deref()).await.map(Answer::Plan)),
            Request::Trace { session, wanted } => done(self.trace(session, &wanted).map(Answer::Traced)),
            Request::Reload => done(self.reload().await.map(|()| Answer::Done)),
            Request::Apply { seconds } => {
                done(self.apply_on_trial(Duration::from_secs(seconds)).await.map(|()| Answer::Done))
            }
            Request::Confirm => done(self.confirm().map(|()| Answer::Done)),
        };
        let _nobody_waits = answer.send(told);
        None
    }
}
